// Intel's tile instructions (AMX, of bfloat16) for processors that don't have them. Preloaded into a
// process, it is called where an instruction is unknown, does what Intel's manual says of it, and
// goes on. A shape that a real processor would refuse ends the process.

#include <csignal>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <atomic>

namespace {

struct Tiles {
    uint8_t shapes[64];
    uint8_t rows[8][16][64];
    int bytes_of(int tile) const { return shapes[16 + 2 * tile] + 256 * shapes[17 + 2 * tile]; }
    int rows_of(int tile) const { return shapes[48 + tile]; }
};
thread_local Tiles tiles;
std::atomic<long> done;
const int REGISTERS[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                         REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

void require(bool so, const char* what) {
    if (so) return;
    fprintf(stderr, "tiles.cpp: %s\n", what);
    abort();
}

float number(const uint8_t* p) {  // of bfloat16; subnormal ones count as 0
    uint32_t bits = uint32_t(p[0] | p[1] << 8) << 16;
    if (!(bits & 0x7f800000)) bits &= 0x80000000;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

void multiply(int sums, int a, int b) {  // TDPBF16PS
    const int deep = tiles.bytes_of(a) / 4, wide = tiles.bytes_of(b) / 4;
    require(sums != a && sums != b && a != b, "a tile is named twice");
    require(tiles.rows_of(b) == deep && tiles.rows_of(sums) == tiles.rows_of(a) &&
                tiles.bytes_of(sums) == tiles.bytes_of(b),
            "tiles that don't fit together");
    for (int m = 0; m < tiles.rows_of(sums); m++)
        for (int n = 0; n < wide; n++) {
            float even = 0, odd = 0, total;
            for (int k = 0; k < deep; k++) {
                const uint8_t *left = tiles.rows[a][m] + 4 * k, *right = tiles.rows[b][k] + 4 * n;
                even = __builtin_fmaf(number(left), number(right), even);
                odd = __builtin_fmaf(number(left + 2), number(right + 2), odd);
            }
            memcpy(&total, tiles.rows[sums][m] + 4 * n, 4);
            total += even + odd;
            memcpy(tiles.rows[sums][m] + 4 * n, &total, 4);
        }
}

void configure(const uint8_t* shapes) {  // LDTILECFG
    memset(&tiles, 0, sizeof tiles);
    memcpy(tiles.shapes, shapes, 64);
    require(shapes[0] == 1, "not palette 1");
    for (int i = 2; i < 16; i++) require(shapes[i] == 0, "a reserved byte is set");
    for (int tile = 0; tile < 16; tile++) {
        int bytes = tiles.bytes_of(tile), rows = tiles.rows_of(tile);
        require(bytes <= 64 && rows <= 16 && !bytes == !rows, "no such shape");
        require(tile < 8 || !rows, "there are 8 tiles");
    }
}

void unknown_instruction(int, siginfo_t*, void* context) {
    auto& registers = ((ucontext_t*)context)->uc_mcontext.gregs;
    const uint8_t* at = (const uint8_t*)registers[REG_RIP];
    auto value = [&](int index) { return (int64_t)registers[REGISTERS[index]]; };
    // A VEX prefix of three bytes, the opcode, ModRM, and for addresses SIB and a displacement.
    require(at[0] == 0xc4 && (at[1] & 31) == 2 && !(at[2] & 0x84), "an unknown instruction");
    const int prefix = at[2] & 3, opcode = at[3], mode = at[4] >> 6, rm = at[4] & 7;
    const int tile = at[4] >> 3 & 7, third = ~at[2] >> 3 & 15;
    const uint8_t* next = at + 5;
    const bool upper_base = !(at[1] & 0x20), upper_index = !(at[1] & 0x40);
    uint8_t* place = nullptr;
    int64_t stride = 0;
    if (mode != 3) {
        int base = rm;
        if (rm == 4) {
            const int scale = *next >> 6, index = (*next >> 3 & 7) + 8 * upper_index;
            base = *next++ & 7;
            stride = index == 4 ? 0 : value(index) * (1 << scale);
        }
        require(mode || base != 5, "an address without a register");
        int32_t more = 0;
        if (mode == 1) more = (int8_t)*next++;
        if (mode == 2) memcpy(&more, next, 4), next += 4;
        place = (uint8_t*)value(base + 8 * upper_base) + more;
    }
    const int bytes = tiles.bytes_of(tile), rows = tiles.rows_of(tile);
    const bool is_used = tiles.shapes[0] == 1;
    require(is_used || opcode == 0x49, "no tiles are configured");
    if (opcode == 0x49 && prefix == 0 && mode != 3) configure(place);
    else if (opcode == 0x49 && prefix == 0) memset(&tiles, 0, sizeof tiles);  // TILERELEASE
    else if (opcode == 0x49 && prefix == 3) memset(tiles.rows[tile], 0, sizeof tiles.rows[tile]);
    else if (opcode == 0x4b && prefix == 3) {  // TILELOADD
        memset(tiles.rows[tile], 0, sizeof tiles.rows[tile]);
        for (int i = 0; i < rows; i++) memcpy(tiles.rows[tile][i], place + i * stride, bytes);
    } else if (opcode == 0x4b && prefix == 2) {  // TILESTORED
        for (int i = 0; i < rows; i++) memcpy(place + i * stride, tiles.rows[tile][i], bytes);
    } else {
        require(opcode == 0x5c && prefix == 2 && mode == 3, "an unknown instruction");
        multiply(tile, rm, third);
    }
    registers[REG_RIP] = (greg_t)next;
    done++;
}

__attribute__((constructor)) void begin() {
    struct sigaction action = {};
    action.sa_sigaction = unknown_instruction;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGILL, &action, nullptr);
}

}  // namespace

extern "C" long tile_instructions() { return done; }

// Linux refuses tiles where there are none.
extern "C" long syscall(long number, ...) {
    va_list rest;
    va_start(rest, number);
    long a[6];
    for (long& each : a) each = va_arg(rest, long);
    va_end(rest);
    if (number == SYS_arch_prctl && a[0] == 0x1023) return 0;
    static const auto real = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
    return real(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
