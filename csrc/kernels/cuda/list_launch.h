// A list program over a caller's entries. A Launcher runs programs: kernels on a stream
// (kernel_launch.h), or, in the tests, all threads on the host. It has
//   using Status = ...; static constexpr Status kSuccess = ..., kTooLarge = ...;
//   template <typename Program> Status launch(const typename Program::Args&, std::int64_t blocks);
#pragma once

#include <cstdint>

#include "list_builder.h"

namespace torch_ext::cuda {
namespace detail {

template <typename Program, typename Launcher, typename ItemOf, typename SetUp>
typename Launcher::Status launch_list(const Launcher& launcher, std::int64_t num_entries,
                                      const ItemOf& item_of, const SetUp& set_up) {
  typename Program::Args args;
  set_up(args);
  return launch_lists(args.list, num_entries, Launcher::kSuccess, Launcher::kTooLarge, item_of,
                      [&](const auto& list) {
                        return launcher.template launch<Program>(args, Program::blocks(list));
                      });
}

}  // namespace detail

/// `item_of(i)` gives entry i as a ListItem; `set_up(args)` fills all of the program's arguments
/// but the list. `Program::blocks(list)` says how many blocks a list takes.
template <template <int> class Program, typename Launcher, typename ItemOf, typename SetUp>
typename Launcher::Status launch_list_program(const Launcher& launcher, std::int64_t num_entries,
                                              const ItemOf& item_of, const SetUp& set_up) {
  using Small = Program<kSmallListBytes>;
  using Large = Program<kLargeListBytes>;
  return fits_small_list<Small::List::kOperands>(num_entries, item_of)
             ? detail::launch_list<Small>(launcher, num_entries, item_of, set_up)
             : detail::launch_list<Large>(launcher, num_entries, item_of, set_up);
}

}  // namespace torch_ext::cuda
