// Which path the newest attention call took.
#pragma once

namespace torch_ext {

/// `path` must live as long as the process.
void record_attention_path(const char* path) noexcept;

}  // namespace torch_ext
