// Makes the n-th change of a directory fail: preloaded into a Python process, it stands between the program and the C
// library's file functions. The process is killed there, the directory is moved away, or the call returns an error, once
// or from then on. It lets the clock jump, too.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static char root[PATH_MAX];
static long at, count, jump, looks;
static int error_number, lasting;

#define ORIGINAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

// Watch `directory` from now on. n: which call fails, from 1; 0 only counts. error: its errno; 0 kills the process, -1
// moves the directory to `directory`.gone and lets the call go on.
void fault_arm(const char *directory, long n, int error, int goes_on) {
  snprintf(root, sizeof root, "%s", directory);
  at = n, count = 0, error_number = error, lasting = goes_on;
}

long fault_count(void) { return count; }

// From now on the time of day is so many seconds ahead at one look, and as many behind at the next.
void fault_clock(long seconds) { jump = seconds; }

static long ahead(void) { return looks++ % 2 ? -jump : jump; }

static int strikes(const char *path) {
  size_t length = strlen(root);
  if (length == 0 || strncmp(path, root, length) != 0) return 0;
  count++;
  if (at == 0 || !(count == at || (lasting && count > at))) return 0;
  if (error_number == 0) kill(getpid(), SIGKILL);
  if (error_number < 0) {
    char gone[PATH_MAX + 8];
    snprintf(gone, sizeof gone, "%s.gone", root);
    ORIGINAL(rename)(root, gone);
    return 0;
  }
  errno = error_number;
  return 1;
}

static int strikes_fd(int fd) {
  char link[64], path[PATH_MAX];
  if (root[0] == 0) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t n = readlink(link, path, sizeof path - 1);
  if (n < 0) return 0;
  path[n] = 0;
  return strikes(path);
}

#define ON_FD(type, name, parameters, arguments) \
  type name parameters { return strikes_fd(fd) ? (type)-1 : ORIGINAL(name) arguments; }
#define ON_PATH(type, name, parameters, arguments) \
  type name parameters { return strikes(path) ? (type)-1 : ORIGINAL(name) arguments; }
#define ON_OPEN(name, parameters, arguments)                                     \
  int name parameters {                                                          \
    mode_t mode = 0;                                                             \
    if (flags & (O_CREAT | O_TMPFILE)) {                                         \
      va_list rest;                                                              \
      va_start(rest, flags);                                                     \
      mode = va_arg(rest, mode_t);                                               \
      va_end(rest);                                                              \
    }                                                                            \
    return (flags & O_CREAT) && strikes(path) ? -1 : ORIGINAL(name) arguments;   \
  }

ON_FD(ssize_t, write, (int fd, const void *data, size_t n), (fd, data, n))
ON_FD(ssize_t, writev, (int fd, const struct iovec *data, int n), (fd, data, n))
ON_FD(ssize_t, pwrite, (int fd, const void *data, size_t n, off_t offset), (fd, data, n, offset))
ON_FD(ssize_t, pwrite64, (int fd, const void *data, size_t n, off64_t offset), (fd, data, n, offset))
ON_FD(ssize_t, sendfile, (int fd, int from, off_t *offset, size_t n), (fd, from, offset, n))
ON_FD(ssize_t, sendfile64, (int fd, int from, off64_t *offset, size_t n), (fd, from, offset, n))
ON_FD(ssize_t, copy_file_range, (int from, off64_t *start, int fd, off64_t *offset, size_t n, unsigned flags),
      (from, start, fd, offset, n, flags))
ON_FD(int, ftruncate, (int fd, off_t n), (fd, n))
ON_FD(int, ftruncate64, (int fd, off64_t n), (fd, n))
ON_FD(int, fsync, (int fd), (fd))
ON_FD(int, fdatasync, (int fd), (fd))
ON_PATH(int, mkdir, (const char *path, mode_t mode), (path, mode))
ON_PATH(int, rename, (const char *path, const char *target), (path, target))
ON_PATH(int, link, (const char *path, const char *target), (path, target))
ON_OPEN(open, (const char *path, int flags, ...), (path, flags, mode))
ON_OPEN(open64, (const char *path, int flags, ...), (path, flags, mode))
ON_PATH(int, unlink, (const char *path), (path))
ON_PATH(int, rmdir, (const char *path), (path))
ON_FD(int, unlinkat, (int fd, const char *path, int flags), (fd, path, flags))

int clock_gettime(clockid_t clock, struct timespec *now) {
  static int (*original)(clockid_t, struct timespec *);
  if (!original) original = ORIGINAL(clock_gettime);
  int result = original(clock, now);
  if (jump && clock == CLOCK_REALTIME) now->tv_sec += ahead();
  return result;
}

time_t time(time_t *place) {
  time_t now = ORIGINAL(time)(NULL) + (jump ? ahead() : 0);
  if (place) *place = now;
  return now;
}
