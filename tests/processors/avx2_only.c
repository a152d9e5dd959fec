/* Lets a Linux program see an x86 processor that has AVX2 and neither AVX-512, VNNI nor AMX, on one that has them.
 *
 *     cc -O2 -shared -fPIC -o avx2_only.so avx2_only.c -ldl
 *     LD_PRELOAD=./avx2_only.so python -m pytest ...
 *
 * Libraries ask the processor by the instruction CPUID what it can do, and choose their code by the answer. Linux can
 * let that instruction fault in a thread (arch_prctl(2), ARCH_SET_CPUID, where the processor has CPUID faulting); the
 * handler here answers in its place, with some bits of leaf 7 taken out. What the program then runs is the code of the
 * older processor, at full speed, and so are its results. Children inherit it by the environment.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define ARCH_SET_CPUID 0x1012
#define BIT(n) (1u << (n))

/* Leaf 7, subleaf 0. */
static const uint32_t avx512_in_ebx = BIT(16) | BIT(17) | BIT(21) | BIT(26) | BIT(27) | BIT(28) | BIT(30) | BIT(31);
static const uint32_t avx512_in_ecx = BIT(1) | BIT(6) | BIT(11) | BIT(12) | BIT(14); /* VNNI is bit 11 */
static const uint32_t newer_in_edx = BIT(2) | BIT(3) | BIT(8) | BIT(22) | BIT(23) | BIT(24) | BIT(25); /* FP16, AMX */
/* Subleaf 1. */
static const uint32_t newer_in_eax = BIT(4) | BIT(5);             /* AVX-VNNI, AVX512-BF16 */
static const uint32_t avx_vnni_in_edx = BIT(4) | BIT(5) | BIT(10); /* AVX-VNNI-INT8, AVX-NE-CONVERT, AVX-VNNI-INT16 */

typedef void (*handler)(int);

static int (*next_sigaction)(int, const struct sigaction *, struct sigaction *);
static struct sigaction theirs; /* what the program wants done with its own segmentation faults */

static long cpuid_allowed(long yes) { return syscall(SYS_arch_prctl, ARCH_SET_CPUID, yes); }

static void answer_cpuid(greg_t *registers) {
    uint32_t leaf = registers[REG_RAX], subleaf = registers[REG_RCX], eax, ebx, ecx, edx;
    cpuid_allowed(1);
    __asm__ volatile("cpuid" : "=a"(eax), "=b"(ebx), "=c"(ecx), "=d"(edx) : "a"(leaf), "c"(subleaf));
    cpuid_allowed(0);
    if (leaf == 7 && subleaf == 0) {
        ebx &= ~avx512_in_ebx;
        ecx &= ~avx512_in_ecx;
        edx &= ~newer_in_edx;
    } else if (leaf == 7 && subleaf == 1) {
        eax &= ~newer_in_eax;
        edx &= ~avx_vnni_in_edx;
    }
    registers[REG_RAX] = eax;
    registers[REG_RBX] = ebx;
    registers[REG_RCX] = ecx;
    registers[REG_RDX] = edx;
    registers[REG_RIP] += 2; /* over the instruction */
}

static void on_fault(int number, siginfo_t *info, void *context) {
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    const uint8_t *instruction = (const uint8_t *)registers[REG_RIP];
    if (info->si_code == SI_KERNEL && instruction[0] == 0x0f && instruction[1] == 0xa2) {
        answer_cpuid(registers);
    } else if (theirs.sa_flags & SA_SIGINFO) {
        theirs.sa_sigaction(number, info, context);
    } else if (theirs.sa_handler != SIG_DFL && theirs.sa_handler != SIG_IGN) {
        theirs.sa_handler(number);
    } else { /* back to the faulting instruction, with nobody left to catch it */
        struct sigaction fall = {.sa_handler = SIG_DFL};
        next_sigaction(SIGSEGV, &fall, NULL);
    }
}

/* Python's faulthandler, JavaScript's engines and compilers catch SIGSEGV themselves: they come after this. */
int sigaction(int number, const struct sigaction *wanted, struct sigaction *before) {
    if (!next_sigaction) next_sigaction = dlsym(RTLD_NEXT, "sigaction");
    if (number != SIGSEGV) return next_sigaction(number, wanted, before);
    if (before) *before = theirs;
    if (wanted) theirs = *wanted;
    return 0;
}

handler signal(int number, handler wanted) {
    handler (*next)(int, handler) = (handler(*)(int, handler))dlsym(RTLD_NEXT, "signal");
    if (number != SIGSEGV) return next(number, wanted);
    struct sigaction before = theirs;
    theirs = (struct sigaction){.sa_handler = wanted};
    return before.sa_flags & SA_SIGINFO ? SIG_DFL : before.sa_handler;
}

__attribute__((constructor)) static void start(void) {
    struct sigaction ours;
    if (!next_sigaction) next_sigaction = dlsym(RTLD_NEXT, "sigaction");
    memset(&ours, 0, sizeof ours);
    ours.sa_sigaction = on_fault;
    ours.sa_flags = SA_SIGINFO | SA_NODEFER | SA_RESTART | SA_ONSTACK;
    next_sigaction(SIGSEGV, &ours, NULL);
    if (cpuid_allowed(0)) fprintf(stderr, "avx2_only: this kernel or processor cannot hide CPUID\n");
}
