// Switch models made out of T5 with a plain feed-forward network.
#pragma once
#include <filesystem>
#include <memory>

#include "moesaic/export/upcycle.h"
#include "moesaic/formats/checkpoint.h"

namespace moesaic::exporting {

/// Every second layer of both halves gets E copies of its network and a router; one works for each token, weighed by
/// its probability:
///
///   y = max_e p_e * FFN(x),  wo of the copies is the dense one times E
///
/// so that with rows of the router near 0 (p_e = 1/E) the model is nearly the dense one. Throws UsageError for methods
/// other than copy and for a T5 that transformers' Switch can't hold: one whose network has a gate.
/// Source: Komatsuzaki et al., "Sparse Upcycling", 2022. Differs: there wo is as it was, which begins far from the
/// dense model.
Upcycled upcycle_switch(const Upcycling& wanted, const std::shared_ptr<const formats::Checkpoint>& base,
                        const std::filesystem::path& out);

}  // namespace moesaic::exporting
