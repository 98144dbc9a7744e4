// .npy files: what NumPy writes is read, what we write comes back, and broken headers are refused.
#include "io/npy.h"

#include "bytes.h"
#include "core/dtype.h"

namespace mla::test {
namespace {

std::string npy(const std::string& dict, const std::string& data, char version = 1) {
  std::string bytes = std::string("\x93NUMPY") + version + '\0';
  bytes += version == 1 ? raw(uint16_t(dict.size())) : raw(uint32_t(dict.size()));
  return bytes + dict + data;
}
std::string dict(const std::string& type, const std::string& shape) {
  return "{'descr': '" + type + "', 'fortran_order': False, 'shape': (" + shape + "), }\n";
}
std::string whole(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

TEST(Npy, reads_the_integer_types) {
  Folder folder;
  auto ids = [&](const std::string& bytes) { return read_npy_ids(folder.write("ids.npy", bytes)); };
  const std::vector<int32_t> wanted{7, 65535};
  EXPECT_EQ(ids(npy(dict("<i4", "2,"), raw(7) + raw(65535))), wanted);
  EXPECT_EQ(ids(npy(dict("<i8", "2,"), raw(int64_t(7)) + raw(int64_t(65535)))), wanted);
  EXPECT_EQ(ids(npy(dict("<u2", "2,"), raw(uint16_t(7)) + raw(uint16_t(65535)))), wanted);
  EXPECT_EQ(ids(npy(dict("<u4", "2,"), raw(7u) + raw(65535u), 2)), wanted);
  EXPECT_EQ(ids(npy(dict("<i4", "0,"), "", 3)), std::vector<int32_t>{});
}

TEST(Npy, what_is_written_comes_back_and_nothing_is_left_beside_it) {
  Folder folder;
  const std::vector<int32_t> ids{1, -2, 3};
  write_npy_ids(folder.path() / "ids.npy", ids);
  EXPECT_EQ(read_npy_ids(folder.path() / "ids.npy"), ids);
  const float values[] = {1, 2, 3, 4, 5, 6};
  write_npy(folder.path() / "rows.npy", values, 2, 3);
  const std::string bytes = whole(folder.path() / "rows.npy");
  EXPECT_EQ(bytes.size(), 128u + 24);
  EXPECT_EQ(bytes.substr(0, 69), std::string("\x93NUMPY\x01\0\x76\0", 10) + "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }");
  EXPECT_EQ(bytes[127], '\n');
  EXPECT_EQ(bytes.substr(128), std::string(reinterpret_cast<const char*>(values), 24));
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(folder.path()), {}), 2);
}

TEST(Npy, a_place_that_cannot_be_written_is_an_error) {
  Folder folder;
  const float value = 1;
  EXPECT_THROW(write_npy(folder.path() / "absent" / "x.npy", {&value, 1}, 1, 1), Error);
}

TEST(Npy, reads_matrices_of_every_precision_and_order) {
  Folder folder;
  auto matrix = [&](const std::string& bytes) { return read_npy_matrix(folder.write("m.npy", bytes)); };
  const std::vector<double> wanted{1, 2, 3, 4, 5, 6};
  std::string f4, f8, f2, columns;
  for (int i = 1; i <= 6; ++i) f4 += raw(float(i)), f8 += raw(double(i)), f2 += raw(f32_to_f16(float(i)));
  for (int i : {1, 4, 2, 5, 3, 6}) columns += raw(float(i));
  for (const auto& [type, data] : {std::pair("<f4", f4), {"<f8", f8}, {"<f2", f2}}) {
    const NpyMatrix m = matrix(npy(dict(type, "2, 3"), data));
    EXPECT_EQ(m.rows, 2);
    EXPECT_EQ(m.cols, 3);
    EXPECT_EQ(m.values, wanted) << type;
  }
  EXPECT_EQ(matrix(npy("{'descr': '<f4', 'fortran_order': True, 'shape': (2, 3), }\n", columns)).values, wanted);
}

TEST(NpyHostile, matrices_that_are_none) {
  Folder folder;
  auto refused = [&](const std::string& bytes) { EXPECT_THROW(read_npy_matrix(folder.write("m.npy", bytes)), Error) << bytes; };
  refused(npy(dict("<f4", "6,"), std::string(24, 0)));
  refused(npy(dict("<f4", "2, 3, 1"), std::string(24, 0)));
  refused(npy(dict("<f4", "-2, -3"), std::string(24, 0)));
  refused(npy(dict("<f4", "2, 4"), std::string(24, 0)));
  refused(npy(dict("<f4", "4294967296, 4294967296"), ""));
  refused(npy(dict("<i4", "2, 3"), std::string(24, 0)));
}

TEST(NpyHostile, broken_files) {
  Folder folder;
  auto refused = [&](const std::string& bytes, std::string_view part) {
    const auto path = folder.write("ids.npy", bytes);
    expect_refused([&] { read_npy_ids(path); }, part);
  };
  const std::string good = npy(dict("<i4", "2,"), raw(7) + raw(8));
  for (size_t n = 0; n < good.size(); ++n) refused(good.substr(0, n), "");
  refused("", "not a .npy file");
  refused(npy(dict("<i4", "2,"), raw(7) + raw(8), 9), "version 9");
  refused(std::string("\x93NUMPY\2\0", 8) + raw(UINT32_MAX) + "{}", "cut short");
  refused(npy("{}", ""), "no readable 'descr'");
  refused(npy(dict("<f4", "1,"), raw(1.0f)), "type <f4");
  refused(npy(dict(">i4", "1,"), raw(1)), "type >i4");
  refused(npy(dict("<i4", "1, 1"), raw(1)), "one row");
  refused(npy(dict("<i4", ""), raw(1)), "one row");
  refused(npy(dict("<i4", "-1,"), raw(1)), "one row");
  refused(npy(dict("<i4", "99999999999999999999,"), raw(1)), "one row");
  refused(npy(dict("<i4", "4611686018427387905,"), raw(1)), "claims 4611686018427387905");
  refused(npy(dict("<i8", "1,"), raw(int64_t(1) << 31)), "does not fit");
  refused(npy(dict("<u4", "1,"), raw(UINT32_MAX)), "does not fit");
  refused(npy("{'descr': '<i4', 'fortran_order': True, 'shape': (1,), }", raw(1)), "Fortran");
}

}  // namespace
}  // namespace mla::test
