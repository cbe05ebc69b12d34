// Precompiled header of what is only tested with.
#pragma once
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "moesaic/base/pch.h"
