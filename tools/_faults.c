/* Interposed between a process and the C library (LD_PRELOAD): counts the calls that change files
   below one folder, and lets one of them, or all from one on, go wrong. No sync is carried out:
   neither a failure nor a killed process needs the disk. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

enum { FAIL, FAIL_ON, SHORT, SHORT_FAIL, KILL_BEFORE, KILL_WITHIN, KILL_AFTER, FAIL_NAMES };

static char folder[PATH_MAX];
static size_t folder_length;
static long site = -1, seen;
static int kind, number;

void fault_arm(const char *path, long at, int what, int error) {
  strncpy(folder, path, sizeof folder - 1);
  folder_length = strlen(folder);
  site = at;
  seen = 0;
  kind = what;
  number = error;
}

long fault_disarm(void) {
  folder_length = 0;
  return seen;
}

static int below(int directory, const char *path) {
  char base[PATH_MAX], link[64];
  ssize_t length;
  if (!folder_length) return 0;
  if (path && path[0] == '/') return !strncmp(path, folder, folder_length);
  if (directory == AT_FDCWD) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
  length = readlink(link, base, sizeof base - 1);
  if (length < 0) return 0;
  base[length] = 0;
  return !strncmp(base, folder, folder_length);
}

/* Whether this call is the one; kills on the way if it is to end the process before it.
   `names`: whether it makes, removes or renames something. */
static int hit(int directory, const char *path, int names) {
  long now;
  if (!below(directory, path)) return 0;
  now = __atomic_fetch_add(&seen, 1, __ATOMIC_SEQ_CST); /* files are synced at the same time */
  if (kind == FAIL_NAMES) return site >= 0 && now >= site && names;
  if (site < 0 || (kind == FAIL_ON ? now < site : now != site)) return 0;
  if (kind == KILL_BEFORE) raise(SIGKILL);
  return 1;
}

static int fails(void) {
  if (kind != FAIL && kind != FAIL_ON && kind != SHORT_FAIL && kind != FAIL_NAMES) return 0;
  errno = number;
  return 1;
}

static void done(int struck) {
  if (struck && (kind == KILL_AFTER || kind == KILL_WITHIN)) raise(SIGKILL);
}

#define REAL(name) \
  static __typeof__(&name) real; \
  if (!real) *(void **)&real = dlsym(RTLD_NEXT, #name)

#define CHANGE(name, names, directory, path, parameters, arguments) \
  int name parameters { \
    REAL(name); \
    int struck = hit(directory, path, names), result; \
    if (struck && fails()) return -1; \
    result = real arguments; \
    done(struck); \
    return result; \
  }

CHANGE(unlink, 1, AT_FDCWD, p, (const char *p), (p))
CHANGE(unlinkat, 1, d, p, (int d, const char *p, int f), (d, p, f))
CHANGE(rmdir, 1, AT_FDCWD, p, (const char *p), (p))
CHANGE(mkdir, 1, AT_FDCWD, p, (const char *p, mode_t m), (p, m))
CHANGE(rename, 1, AT_FDCWD, p, (const char *p, const char *q), (p, q))
CHANGE(renameat2, 1, d, p, (int d, const char *p, int e, const char *q, unsigned f), (d, p, e, q, f))
CHANGE(ftruncate, 0, fd, NULL, (int fd, off_t n), (fd, n))
CHANGE(ftruncate64, 0, fd, NULL, (int fd, off64_t n), (fd, n))

#define SYNC(name) \
  int name(int fd) { \
    int struck = hit(fd, NULL, 0); \
    if (struck && fails()) return -1; \
    done(struck); \
    return 0; \
  }

SYNC(fsync)
SYNC(fdatasync)

#define WRITE(name, parameters, arguments, half) \
  ssize_t name parameters { \
    REAL(name); \
    int struck = hit(fd, NULL, 0); \
    ssize_t result; \
    if (struck && kind != KILL_AFTER) { \
      if (kind == FAIL || kind == FAIL_ON) return fails(), -1; \
      result = real half; \
      done(struck); \
      return fails() ? -1 : result; \
    } \
    result = real arguments; \
    done(struck); \
    return result; \
  }

WRITE(write, (int fd, const void *b, size_t n), (fd, b, n), (fd, b, n / 2))
WRITE(pwrite, (int fd, const void *b, size_t n, off_t o), (fd, b, n, o), (fd, b, n / 2, o))
WRITE(pwrite64, (int fd, const void *b, size_t n, off64_t o), (fd, b, n, o), (fd, b, n / 2, o))

#define OPEN(name, directory, parameters, arguments) \
  int name parameters { \
    REAL(name); \
    va_list rest; \
    mode_t mode = 0; \
    int struck = 0, result; \
    if (flags & O_CREAT) { \
      va_start(rest, flags); \
      mode = va_arg(rest, mode_t); \
      va_end(rest); \
    } \
    if (flags & (O_CREAT | O_WRONLY | O_RDWR | O_TRUNC)) { \
      int makes = (flags & O_CREAT) && faccessat(directory, path, F_OK, 0); \
      struck = hit(directory, path, makes); \
    } \
    if (struck && fails()) return -1; \
    result = real arguments; \
    done(struck); \
    return result; \
  }

OPEN(open, AT_FDCWD, (const char *path, int flags, ...), (path, flags, mode))
OPEN(open64, AT_FDCWD, (const char *path, int flags, ...), (path, flags, mode))
OPEN(openat, d, (int d, const char *path, int flags, ...), (d, path, flags, mode))
OPEN(openat64, d, (int d, const char *path, int flags, ...), (d, path, flags, mode))
