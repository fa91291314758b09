/* Counts the bytes that a process copies in large pieces, for bench_tensors.py.
 *
 * Preloaded in front of libc it takes the place of memcpy and memmove and adds up the bytes of every call of at least
 * PIECE bytes, in a counter that lies in the file that COPIES_FILE names, so that the benchmark reads it from outside.
 * What the kernel copies between a socket and memory is not counted, nor is copying that is compiled into loops (numpy
 * copies contiguous arrays with memcpy, so that is).
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#define PIECE 4096

typedef void *copy_function(void *, const void *, size_t);

static _Atomic unsigned long long unused_counter;
static _Atomic unsigned long long *copied = &unused_counter;
static copy_function *real_memcpy, *real_memmove;

__attribute__((constructor)) static void start(void) {
    real_memcpy = (copy_function *)dlsym(RTLD_NEXT, "memcpy");
    real_memmove = (copy_function *)dlsym(RTLD_NEXT, "memmove");
    const char *name = getenv("COPIES_FILE");
    int file = name == NULL ? -1 : open(name, O_RDWR);
    if (file < 0) return;
    void *page = mmap(NULL, sizeof *copied, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (page != MAP_FAILED) copied = page;
}

static void count(size_t size) {
    if (size >= PIECE) atomic_fetch_add_explicit(copied, size, memory_order_relaxed);
}

/* For calls before the constructor ran: byte by byte, in the direction that an overlap needs. */
static void *plain(void *to, const void *from, size_t size) {
    volatile char *t = to;
    const char *f = from;
    if ((const char *)to < f)
        for (size_t i = 0; i < size; i++) t[i] = f[i];
    else
        for (size_t i = size; i-- > 0;) t[i] = f[i];
    return to;
}

void *memcpy(void *restrict to, const void *restrict from, size_t size) {
    count(size);
    return real_memcpy != NULL ? real_memcpy(to, from, size) : plain(to, from, size);
}

void *memmove(void *to, const void *from, size_t size) {
    count(size);
    return real_memmove != NULL ? real_memmove(to, from, size) : plain(to, from, size);
}

/* What the compiler calls instead where it knows the size of the target. */
void *__memcpy_chk(void *to, const void *from, size_t size, size_t room) {
    if (size > room) abort();
    return memcpy(to, from, size);
}

void *__memmove_chk(void *to, const void *from, size_t size, size_t room) {
    if (size > room) abort();
    return memmove(to, from, size);
}
