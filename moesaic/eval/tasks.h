// The files of tasks/, as the build put them into the program (cmake/Embed.cmake).
#pragma once
#include <string_view>

namespace moesaic::eval {

extern const std::string_view kGsm8kYaml, kHumanevalYaml, kMbppYaml, kT0Yaml;
extern const std::string_view kMgsmDirectBnYaml, kMgsmDirectDeYaml, kMgsmDirectEnYaml, kMgsmDirectEsYaml,
    kMgsmDirectFrYaml, kMgsmDirectJaYaml, kMgsmDirectRuYaml, kMgsmDirectSwYaml, kMgsmDirectTeYaml, kMgsmDirectThYaml,
    kMgsmDirectZhYaml;

}  // namespace moesaic::eval
