"""Documents of uneven lengths as batches without padding: packing, a batch sampler, a collator.

    lengths = [len(tokens) for tokens in documents]
    sampler = torch_ext.data.PackedBatchSampler(lengths, capacity=4096)
    collate = torch_ext.data.PackingCollator()
    for batch in torch.utils.data.DataLoader(documents, batch_sampler=sampler, collate_fn=collate):
        ...

Reading, tokenising and file formats stay with ``datasets`` and its like.
"""

from torch_ext.data.packed_batch_sampler import PackedBatchSampler
from torch_ext.data.packing_collator import PackingCollator
from torch_ext.data.sequence_packing import pack_sequences

__all__ = ["PackedBatchSampler", "PackingCollator", "pack_sequences"]
