/* Preloaded, gives a process a wall clock that a file sets off, and a disk that another breaks. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

/* The number in the file that a variable names, 0 if there is none. */
static long number_in(const char *variable) {
    static int (*real_open)(const char *, int, ...);
    if (!real_open) real_open = (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, "open");
    char text[32] = {0};
    int before = errno;
    const char *file = getenv(variable);
    int descriptor = file ? real_open(file, O_RDONLY | O_CLOEXEC) : -1;
    long length = descriptor < 0 ? 0 : read(descriptor, text, sizeof text - 1);
    if (descriptor >= 0) close(descriptor);
    errno = before;
    return length > 0 ? atol(text) : 0;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(clock, now);
    if (!result && clock == CLOCK_REALTIME) now->tv_sec += number_in("CHAOS_CLOCK");
    return result;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec precise;
    (void)zone;
    int result = clock_gettime(CLOCK_REALTIME, &precise);
    now->tv_sec = precise.tv_sec;
    now->tv_usec = precise.tv_nsec / 1000;
    return result;
}

time_t time(time_t *where) {
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    if (where) *where = precise.tv_sec;
    return precise.tv_sec;
}

/* The error that a change of this file gives now, 0 if none: it lies on the broken disk. */
static int fails(int folder, const char *path) {
    const char *disk = getenv("CHAOS_DISK_AT");
    long error = disk ? number_in("CHAOS_DISK") : 0;
    if (!error) return 0;
    char whole[PATH_MAX] = {0};
    if (!path || path[0] != '/') {
        char link[64];
        if (folder == AT_FDCWD) strcpy(link, "/proc/self/cwd");
        else snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        if (readlink(link, whole, sizeof whole - 1) < 0) return 0;
        if (path) strncat(strcat(whole, "/"), path, sizeof whole - strlen(whole) - 2);
    } else strncpy(whole, path, sizeof whole - 1);
    if (strncmp(whole, disk, strlen(disk))) return 0;
    errno = (int)error;
    return 1;
}

static int changes(int flags) { return (flags & O_ACCMODE) != O_RDONLY || flags & (O_CREAT | O_TRUNC); }

#define OPEN(name)                                                      \
    int name(const char *path, int flags, ...) {                        \
        va_list rest;                                                   \
        va_start(rest, flags);                                          \
        mode_t mode = va_arg(rest, mode_t);                             \
        va_end(rest);                                                   \
        REAL(name);                                                     \
        return changes(flags) && fails(AT_FDCWD, path) ? -1 : real(path, flags, mode); \
    }
#define OPENAT(name)                                                    \
    int name(int folder, const char *path, int flags, ...) {            \
        va_list rest;                                                   \
        va_start(rest, flags);                                          \
        mode_t mode = va_arg(rest, mode_t);                             \
        va_end(rest);                                                   \
        REAL(name);                                                     \
        return changes(flags) && fails(folder, path) ? -1 : real(folder, path, flags, mode); \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int file, const void *bytes, size_t count) {
    static ssize_t (*real)(int, const void *, size_t);
    if (!real) real = (ssize_t (*)(int, const void *, size_t))dlsym(RTLD_NEXT, "write");
    return fails(file, NULL) ? -1 : real(file, bytes, count);
}

ssize_t pwrite64(int file, const void *bytes, size_t count, off64_t at) {
    REAL(pwrite64);
    return fails(file, NULL) ? -1 : real(file, bytes, count, at);
}

int ftruncate64(int file, off64_t length) {
    REAL(ftruncate64);
    return fails(file, NULL) ? -1 : real(file, length);
}

int fsync(int file) {
    REAL(fsync);
    return fails(file, NULL) ? -1 : real(file);
}

int rename(const char *from, const char *to) {
    REAL(rename);
    return fails(AT_FDCWD, to) ? -1 : real(from, to);
}

int mkdir(const char *path, mode_t mode) {
    REAL(mkdir);
    return fails(AT_FDCWD, path) ? -1 : real(path, mode);
}

int unlink(const char *path) {
    REAL(unlink);
    return fails(AT_FDCWD, path) ? -1 : real(path);
}

int unlinkat(int folder, const char *path, int flags) {
    REAL(unlinkat);
    return fails(folder, path) ? -1 : real(folder, path, flags);
}
