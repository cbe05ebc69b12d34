// Pages that draw the data put into them.
#pragma once
#include <initializer_list>
#include <string>
#include <string_view>

#include "moesaic/base/json.h"

namespace moesaic::eval {

/// `html` with style sheets, scripts and its data in it, so that it needs nothing from outside:
///
///   <link rel="stylesheet" href="...">                 becomes <style>pages/page.css and all of css</style>
///   <script id="data" type="application/json"></script>   holds the JSON, safe inside of the element
///   <script src="..."></script>                        becomes <script>pages/page.js and all of js</script>
///
/// Each must stand in `html` once.
std::string page_of(std::string_view html, std::initializer_list<std::string_view> css,
                    std::initializer_list<std::string_view> js, const OrderedJson& data);

}  // namespace moesaic::eval
