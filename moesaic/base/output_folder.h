// What keeps the files of a user who names the wrong folder, and of a run at work in it.
#pragma once
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

namespace moesaic {

/// A file beside `path` that only this process writes, to be renamed to it.
std::string temporary_name(const std::filesystem::path& path);
/// Deletes such files in `dir` and its subfolders whose process is no more.
void remove_dead_temporaries(const std::filesystem::path& dir);

/// The name of something in `dir` that a model, an adapter, a composition or a run left there; "" when there is none.
std::string found_work(const std::filesystem::path& dir);

/// Throws UsageError where no folder `dir` is or can be made and written. `what` names it. Nothing is made.
void check_writable(const std::filesystem::path& dir, const std::string& what);

/// Throws UsageError where `dir` is what one of `inputs` (folders or files; "" is none) is read from, by whatever links
/// and spellings.
void check_not_an_input(const std::filesystem::path& dir, const std::vector<std::filesystem::path>& inputs);
/// For what is written anew: the same, and `dir` must hold no work. Removes what dead processes left half written.
void check_new_folder(const std::filesystem::path& dir, const std::vector<std::filesystem::path>& inputs);

/// Writes a file where there is none. One with these very bytes may stand there; throws UsageError for any other.
void write_new_file(const std::filesystem::path& path, std::string_view bytes);

/// While it lives, no other process holds the same folder. Ends with the process, however that ends.
class FolderLock {
 public:
  /// Makes the folder when it is absent. Throws UsageError naming the holder when another one has it.
  explicit FolderLock(const std::filesystem::path& dir);
  /// Removes what the constructor made and nobody filled.
  ~FolderLock();
  FolderLock(const FolderLock&) = delete;
  FolderLock& operator=(const FolderLock&) = delete;

 private:
  std::filesystem::path dir_, file_;
  std::vector<std::filesystem::path> made_;  // folders, the outermost first
  int descriptor_ = -1;
};

}  // namespace moesaic
