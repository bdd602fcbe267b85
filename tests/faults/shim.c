/* Faults at the n-th change of a folder. Preloaded into the processes of tests/faults/server.py.

   It stands between a program and the C library, so that every write counts, whoever makes it: Python, the Rust inside
   safetensors and tokenizers, SQLite. Counted are the calls that change what lies below the prefix. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, KILL, TORN, FULL, BROKEN };

static char prefix[PATH_MAX];
static long fault_at;
static int fault_mode, log_fd = -1, armed;
static atomic_long count;

void fault_arm(const char *folder, long at, int mode, const char *log) {
    strncpy(prefix, folder, sizeof prefix - 1);
    fault_at = at;
    fault_mode = mode;
    log_fd = log ? open(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600) : -1;
    armed = 1;
}

static int below(const char *path) {
    size_t length = strlen(prefix);
    return strncmp(path, prefix, length) == 0 && (path[length] == '/' || path[length] == 0);
}

static int of_fd(int fd, char *out) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, out, PATH_MAX - 1);
    if (length < 0) return 0;
    out[length] = 0;
    return 1;
}

static int of_path(int dir, const char *path, char *out) {
    char base[PATH_MAX];
    if (path[0] == '/') {
        snprintf(out, PATH_MAX, "%s", path);
        return 1;
    }
    if (dir == AT_FDCWD ? getcwd(base, sizeof base) == NULL : !of_fd(dir, base)) return 0;
    return snprintf(out, PATH_MAX, "%s/%s", base, path) < PATH_MAX;
}

/* What to do with this call: 0 go on, 1 half of it and then die, -1 fail with errno set. */
static int judge(const char *what, const char *path, int takes_room) {
    if (!armed || !below(path)) return 0;
    long number = atomic_fetch_add(&count, 1) + 1;
    if (log_fd >= 0) {
        char line[PATH_MAX + 64];
        int length = snprintf(line, sizeof line, "%s %d %s\n", what, takes_room, path + strlen(prefix));
        ssize_t (*real)(int, const void *, size_t) = dlsym(RTLD_NEXT, "write");
        real(log_fd, line, (size_t)length);
    }
    if (fault_mode == FULL && number >= fault_at && takes_room) return errno = ENOSPC, -1;
    if (number != fault_at) return 0;
    if (fault_mode == KILL) kill(getpid(), SIGKILL);
    if (fault_mode == TORN) return 1;
    if (fault_mode == BROKEN) return errno = EIO, -1;
    return 0;
}

#define REAL(name) static __typeof__(name) *real; if (!real) real = dlsym(RTLD_NEXT, #name)
#define END(verdict) do { if ((verdict) == 1) kill(getpid(), SIGKILL); } while (0)

#define BY_FD(result, name, takes_room, parameters, arguments, half) \
    result name parameters { \
        REAL(name); \
        char path[PATH_MAX]; \
        int verdict = armed && of_fd(fd, path) ? judge(#name, path, takes_room) : 0; \
        if (verdict < 0) return -1; \
        result done = verdict == 1 ? half : real arguments; \
        END(verdict); \
        return done; \
    }

BY_FD(ssize_t, write, 1, (int fd, const void *data, size_t size), (fd, data, size), real(fd, data, size / 2))
BY_FD(ssize_t, pwrite, 1, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at),
      real(fd, data, size / 2, at))
BY_FD(ssize_t, pwrite64, 1, (int fd, const void *data, size_t size, off64_t at), (fd, data, size, at),
      real(fd, data, size / 2, at))
BY_FD(ssize_t, writev, 1, (int fd, const struct iovec *parts, int number), (fd, parts, number),
      real(fd, parts, number / 2))
BY_FD(int, ftruncate, 1, (int fd, off_t size), (fd, size), real(fd, size))
BY_FD(int, ftruncate64, 1, (int fd, off64_t size), (fd, size), real(fd, size))
BY_FD(int, fallocate, 1, (int fd, int mode, off_t at, off_t size), (fd, mode, at, size), real(fd, mode, at, size))
BY_FD(int, posix_fallocate, 1, (int fd, off_t at, off_t size), (fd, at, size), real(fd, at, size))
BY_FD(int, fsync, 0, (int fd), (fd), real(fd))
BY_FD(int, fdatasync, 0, (int fd), (fd), real(fd))

#define BY_PATH(name, takes_room, dir, told, parameters, arguments) \
    int name parameters { \
        REAL(name); \
        char path[PATH_MAX]; \
        int verdict = armed && of_path(dir, told, path) ? judge(#name, path, takes_room) : 0; \
        if (verdict < 0) return -1; \
        int done = real arguments; \
        END(verdict); \
        return done; \
    }

BY_PATH(rename, 0, AT_FDCWD, to, (const char *from, const char *to), (from, to))
BY_PATH(renameat, 0, d2, to, (int d1, const char *from, int d2, const char *to), (d1, from, d2, to))
BY_PATH(renameat2, 0, d2, to, (int d1, const char *from, int d2, const char *to, unsigned f), (d1, from, d2, to, f))
BY_PATH(link, 1, AT_FDCWD, to, (const char *from, const char *to), (from, to))
BY_PATH(symlink, 1, AT_FDCWD, to, (const char *from, const char *to), (from, to))
BY_PATH(mkdir, 1, AT_FDCWD, at, (const char *at, mode_t mode), (at, mode))
BY_PATH(mkdirat, 1, dir, at, (int dir, const char *at, mode_t mode), (dir, at, mode))
BY_PATH(unlink, 0, AT_FDCWD, at, (const char *at), (at))
BY_PATH(unlinkat, 0, dir, at, (int dir, const char *at, int flags), (dir, at, flags))
BY_PATH(rmdir, 0, AT_FDCWD, at, (const char *at), (at))
BY_PATH(truncate, 0, AT_FDCWD, at, (const char *at, off_t size), (at, size))

#define OPENING(name, dir, parameters, arguments) \
    int name parameters { \
        REAL(name); \
        mode_t mode = 0; \
        if (flags & (O_CREAT | __O_TMPFILE)) { va_list more; va_start(more, flags); mode = va_arg(more, mode_t); va_end(more); } \
        char path[PATH_MAX]; \
        int verdict = armed && flags & (O_CREAT | O_TRUNC) && of_path(dir, at, path) ? judge(#name, path, 1) : 0; \
        if (verdict < 0) return -1; \
        int done = real arguments; \
        END(verdict); \
        return done; \
    }

OPENING(open, AT_FDCWD, (const char *at, int flags, ...), (at, flags, mode))
OPENING(open64, AT_FDCWD, (const char *at, int flags, ...), (at, flags, mode))
OPENING(openat, dir, (int dir, const char *at, int flags, ...), (dir, at, flags, mode))
OPENING(openat64, dir, (int dir, const char *at, int flags, ...), (dir, at, flags, mode))
