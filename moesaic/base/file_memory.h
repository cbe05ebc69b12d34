// What was found out about files, kept while they do not change.
#pragma once
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

namespace moesaic {

/// Keeps it in this folder, too, for later runs of the program; "" (as at the start) is this process alone.
void set_file_memory(const std::filesystem::path& folder);
std::filesystem::path file_memory();

/// work()'s value, or what an earlier call for `what` and these files gave, while each has the same size, times and
/// inode. Files changed within the last two seconds are not remembered: their times don't tell changes apart.
std::string remembered(const std::string& what, const std::vector<std::filesystem::path>& files,
                       const std::function<std::string()>& work);

/// SHA-256 of all bytes of a file, remembered. Throws DataError when it can't be read.
std::string file_sha256(const std::filesystem::path& file);

}  // namespace moesaic
