// Continues token ids with a model that kbit_inductor.export has written, without Python. The most likely token is taken each time,
// and the whole text is read again for it: the package holds the model's call, not a cache of keys and values.
//
//   generate model.pt2 COUNT ID...
//
// writes the COUNT new ids on one line, then a line of what memory the process holds.

#include <cstdlib>
#include <fstream>
#include <iostream>
#include <string>
#include <vector>

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

namespace {

// Lines of /proc/self/status: resident memory, of which anonymous memory is held and mapped files can be dropped by the system.
void print_memory() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    for (const char* key : {"VmHWM:", "VmRSS:", "RssAnon:", "RssFile:"}) {
      if (line.rfind(key, 0) == 0) std::cout << key << std::stol(line.substr(std::string(key).size())) << " kB ";
    }
  }
  std::cout << std::endl;
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 4) {
    std::cerr << "usage: generate PACKAGE COUNT ID..." << std::endl;
    return 2;
  }
  const c10::InferenceMode inference;
  torch::inductor::AOTIModelPackageLoader model(arguments[1]);
  std::vector<int64_t> ids;
  for (int i = 3; i < count; ++i) ids.push_back(std::atoll(arguments[i]));
  for (int step = 0; step < std::atoi(arguments[2]); ++step) {
    const at::Tensor text = at::tensor(ids, at::kLong).unsqueeze(0);
    const at::Tensor logits = model.run({text})[0];  // [1, tokens, vocabulary]
    ids.push_back(logits.select(1, -1).argmax().item<int64_t>());
    std::cout << ids.back() << ' ';
  }
  std::cout << std::endl;
  print_memory();
}
