// The text to learn: sums in decimal, "17+5=22;", one after the other.
#pragma once

#include <random>
#include <string>
#include <string_view>

inline constexpr std::string_view kAlphabet = "0123456789+=;";

/// At least `length` characters, the same for the same seed.
inline std::string sums(std::size_t length, unsigned seed) {
  std::mt19937 random(seed);
  std::string text;
  while (text.size() < length) {
    const unsigned a = random() % 50;
    const unsigned b = random() % 50;
    text += std::to_string(a) + '+' + std::to_string(b) + '=' + std::to_string(a + b) + ';';
  }
  return text;
}
