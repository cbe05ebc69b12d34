// Joining frozen models: what a file of `moesaic compose` says becomes a composition's folder.
#pragma once
#include <cstdint>
#include <string>

#include "moesaic/base/json.h"
#include "moesaic/models/causal_lm.h"
#include "moesaic/run/plan.h"

namespace moesaic::run {

/// Opens the models that `keys` names (docs/cli.md), joins them with new connections and writes their folder, which is
/// its anchor until it is trained. `seed` is used where the keys give none. Returns what was composed. Throws
/// UsageError for keys and values that can't be, named with `where`, and what opening models and writing the folder
/// throws.
Plan compose_models(const Json& keys, const std::string& where, uint64_t seed, const models::LoadOptions& load);

}  // namespace moesaic::run
