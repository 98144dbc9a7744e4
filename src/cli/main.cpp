// The program `mla`.
int main() { return 0; }
