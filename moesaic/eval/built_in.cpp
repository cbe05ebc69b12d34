// The tasks of the program.
#include "moesaic/eval/tasks.h"

#include "moesaic/eval/task_file.h"

namespace moesaic::eval {

const std::vector<BuiltIn> kBuiltIn{{"gsm8k", kGsm8kYaml},
                                    {"humaneval", kHumanevalYaml},
                                    {"mbpp", kMbppYaml},
                                    {"mgsm_direct_bn", kMgsmDirectBnYaml},
                                    {"mgsm_direct_de", kMgsmDirectDeYaml},
                                    {"mgsm_direct_en", kMgsmDirectEnYaml},
                                    {"mgsm_direct_es", kMgsmDirectEsYaml},
                                    {"mgsm_direct_fr", kMgsmDirectFrYaml},
                                    {"mgsm_direct_ja", kMgsmDirectJaYaml},
                                    {"mgsm_direct_ru", kMgsmDirectRuYaml},
                                    {"mgsm_direct_sw", kMgsmDirectSwYaml},
                                    {"mgsm_direct_te", kMgsmDirectTeYaml},
                                    {"mgsm_direct_th", kMgsmDirectThYaml},
                                    {"mgsm_direct_zh", kMgsmDirectZhYaml},
                                    {"t0", kT0Yaml}};

}  // namespace moesaic::eval
