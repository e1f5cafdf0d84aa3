/* A file system like a mounted bucket, for LD_PRELOAD: below $REFUSES there is no mmap of files, no link, no rename of
 * folders, no lock, as object stores have none of them. What is called is noted in $REFUSES.calls. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static int below(const char *path) {
    const char *top = getenv("REFUSES");
    size_t n = top ? strlen(top) : 0;
    return n && !strncmp(path, top, n) && path[n] == '/';
}

static int open_below(int fd) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return below(path);
}

static int refuse(const char *what, int number) {
    char name[PATH_MAX];
    snprintf(name, sizeof name, "%s.calls", getenv("REFUSES"));
    int fd = open(name, O_WRONLY | O_CREAT | O_APPEND, 0644);
    if (fd >= 0) {
        dprintf(fd, "%s\n", what);
        close(fd);
    }
    errno = number;
    return -1;
}

void *mmap(void *at, size_t size, int protection, int flags, int fd, off_t offset) {
    static void *(*real)(void *, size_t, int, int, int, off_t);
    if (!real) real = dlsym(RTLD_NEXT, "mmap");
    if (fd >= 0 && open_below(fd)) {
        refuse("mmap", ENODEV);
        return MAP_FAILED;
    }
    return real(at, size, protection, flags, fd, offset);
}

void *mmap64(void *at, size_t size, int protection, int flags, int fd, off_t offset) {
    return mmap(at, size, protection, flags, fd, offset);
}

int link(const char *from, const char *to) {
    static int (*real)(const char *, const char *);
    if (!real) real = dlsym(RTLD_NEXT, "link");
    return below(to) ? refuse("link", EPERM) : real(from, to);
}

static int is_folder(const char *path) {
    struct stat found;
    return !stat(path, &found) && S_ISDIR(found.st_mode);
}

int rename(const char *from, const char *to) {
    static int (*real)(const char *, const char *);
    if (!real) real = dlsym(RTLD_NEXT, "rename");
    return below(from) && is_folder(from) ? refuse("rename of a folder", EPERM) : real(from, to);
}

int renameat(int old, const char *from, int new, const char *to) {
    static int (*real)(int, const char *, int, const char *);
    if (!real) real = dlsym(RTLD_NEXT, "renameat");
    return from[0] == '/' && below(from) && is_folder(from) ? refuse("rename of a folder", EPERM)
                                                            : real(old, from, new, to);
}

int flock(int fd, int operation) {
    static int (*real)(int, int);
    if (!real) real = dlsym(RTLD_NEXT, "flock");
    return open_below(fd) ? refuse("flock", ENOTSUP) : real(fd, operation);
}
