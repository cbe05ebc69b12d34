// Texts of files and models, as a terminal may be given them.
#pragma once
#include <string>
#include <string_view>

namespace moesaic {

/// `text` with every character that a terminal acts on, but for tabs and line ends, written as JSON escapes it
/// (\u001b): control characters (C0, DEL, C1) and the marks that turn the direction of what follows. JSON stays the
/// same JSON. A byte that is no UTF-8 and that some terminals take for a control character becomes \x9b.
std::string visible(std::string_view text);
/// The same for what must stay in its line, as a name in a table: tabs and line ends are escaped, too.
std::string visible_in_line(std::string_view text);

}  // namespace moesaic
