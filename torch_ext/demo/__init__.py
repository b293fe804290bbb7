"""The demo: a small GPT learns real text, once on stock PyTorch and once on torch_ext.

Run ``python -m torch_ext.demo`` (``--help`` lists the options). Both runs start from one seed, see
the same batches and differ only in what a :class:`~torch_ext.demo.comparison.Variant` says, so
that their loss curves can be laid side by side. First the attention differs, then the loop over
the micro-batches of each step.
"""
