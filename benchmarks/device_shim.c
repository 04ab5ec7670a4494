/* Preloaded into a real agent process, so that the product needs no code for tests: a wall clock that jumps by as many
 * seconds as the file $SHIM_CLOCK_FILE says, and a disk whose every fsync takes $SHIM_FSYNC_US longer. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long clock_offset_s(void) {
    const char *path = getenv("SHIM_CLOCK_FILE");
    long offset = 0;
    FILE *file = path ? fopen(path, "r") : NULL;
    if (file) {
        if (fscanf(file, "%ld", &offset) != 1) offset = 0;
        fclose(file);
    }
    return offset;
}

int clock_gettime(clockid_t id, struct timespec *found) {
    int failed = (int)syscall(SYS_clock_gettime, id, found);
    if (!failed && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) found->tv_sec += clock_offset_s();
    return failed;
}

int gettimeofday(struct timeval *restrict found, void *restrict zone) {
    struct timespec now;
    (void)zone;
    if (clock_gettime(CLOCK_REALTIME, &now)) return -1;
    found->tv_sec = now.tv_sec;
    found->tv_usec = now.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *found) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (found) *found = now.tv_sec;
    return now.tv_sec;
}

int fsync(int descriptor) {
    const char *delay = getenv("SHIM_FSYNC_US");
    if (delay) usleep((useconds_t)atol(delay));
    return (int)syscall(SYS_fsync, descriptor);
}
