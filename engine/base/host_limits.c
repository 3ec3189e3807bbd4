#include "engine/base/host_limits.h"

#include <sched.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Control groups nest and every level limits, so each file is read in the group of
 * this process and in all groups above it.  Version 2 has one tree under
 * /sys/fs/cgroup; version 1 has one a controller, below a folder of its name.  A
 * container often sees its own group mounted as the root: the paths then do not
 * exist, and the walk still reaches the root. */

enum { PATH_BYTES = 4096 };

/* The first line of a small file; false when there is none. */
static bool read_line(const char *path, char *line, int line_bytes)
{
    FILE *f = fopen(path, "re");

    if (!f)
        return false;
    bool got = fgets(line, line_bytes, f) != NULL;
    fclose(f);
    return got;
}

/* The path of this process in the tree of controller ("" is version 2), from lines
 * "id:controllers:path" of /proc/self/cgroup. */
static bool own_group(const char *controller, char *group, size_t group_bytes)
{
    char line[PATH_BYTES];
    bool found = false;
    FILE *f = fopen("/proc/self/cgroup", "re");

    while (f && !found && fgets(line, sizeof line, f)) {
        char *names = strchr(line, ':');
        char *path = names ? strchr(names + 1, ':') : NULL;
        if (!path)
            continue;
        *path++ = '\0';
        path[strcspn(path, "\n")] = '\0';
        for (char *name = names + 1; name && !found;) {
            size_t n = strcspn(name, ",");
            found = n == strlen(controller) && strncmp(name, controller, n) == 0;
            name = name[n] ? name + n + 1 : NULL;
        }
        if (found)
            snprintf(group, group_bytes, "%s", path);
    }
    if (f)
        fclose(f);
    return found;
}

/* Call visit on the path of `file` in the own group and in every group above. */
static void visit_groups(const char *controller, const char *file,
                         void (*visit)(const char *path, void *arg), void *arg)
{
    char group[PATH_BYTES], path[2 * PATH_BYTES];

    if (!own_group(controller, group, sizeof group))
        return;
    for (;;) {
        snprintf(path, sizeof path, "/sys/fs/cgroup%s%s%s/%s", *controller ? "/" : "",
                 controller, strcmp(group, "/") == 0 ? "" : group, file);
        visit(path, arg);
        char *last = strrchr(group, '/');
        if (!last || !*group)
            return;
        *last = '\0';
    }
}

/* A limit of "max", -1 or nonsense is no limit. */
static void lower_bytes(const char *path, void *arg)
{
    uint64_t *limit = arg;
    char line[64], *end;

    if (!read_line(path, line, sizeof line) || line[0] < '0' || line[0] > '9')
        return;
    uint64_t bytes = strtoull(line, &end, 10);
    if (bytes > 0 && bytes < *limit)
        *limit = bytes;
}

size_t host_memory_limit(void)
{
    uint64_t limit = (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE);

    visit_groups("", "memory.max", lower_bytes, &limit);
    visit_groups("memory", "memory.limit_in_bytes", lower_bytes, &limit);
    return limit > SIZE_MAX ? SIZE_MAX : (size_t)limit;
}

/* The number behind a key, in a file of lines "key number" or "key: number unit". */
static bool read_keyed(const char *path, const char *key, uint64_t *value)
{
    char line[256];
    size_t n = strlen(key);
    bool found = false;
    FILE *f = fopen(path, "re");

    while (f && !found && fgets(line, sizeof line, f)) {
        found = strncmp(line, key, n) == 0 && strchr(": ", line[n]) && line[n];
        if (found)
            *value = strtoull(line + n + 1, NULL, 10);
    }
    if (f)
        fclose(f);
    return found;
}

/* What a group uses is in a file beside its limit.  Of that, the contents of files, which
 * memory.stat counts under two keys, can be had back. */
struct group_usage {
    const char *file, *inactive, *active;
    uint64_t *available;             /* the least so far */
};

static void lower_available(const char *path, void *arg)
{
    const struct group_usage *usage = arg;
    const int folder = (int)(strrchr(path, '/') - path);
    char line[64], beside[2 * PATH_BYTES + 32];
    uint64_t limit = UINT64_MAX, inactive = 0, active = 0;

    lower_bytes(path, &limit);
    snprintf(beside, sizeof beside, "%.*s/%s", folder, path, usage->file);
    if (limit == UINT64_MAX || !read_line(beside, line, sizeof line))
        return;
    uint64_t used = strtoull(line, NULL, 10);
    snprintf(beside, sizeof beside, "%.*s/memory.stat", folder, path);
    (void)read_keyed(beside, usage->inactive, &inactive);
    (void)read_keyed(beside, usage->active, &active);
    used -= inactive + active < used ? inactive + active : used;
    uint64_t left = used < limit ? limit - used : 0;
    if (left < *usage->available)
        *usage->available = left;
}

size_t host_memory_available(void)
{
    uint64_t available, kilobytes;
    struct group_usage v2 = { "memory.current", "inactive_file", "active_file", &available };
    struct group_usage v1 = { "memory.usage_in_bytes", "total_inactive_file",
                              "total_active_file", &available };

    if (read_keyed("/proc/meminfo", "MemAvailable", &kilobytes))
        available = kilobytes * 1024;
    else
        available = (uint64_t)sysconf(_SC_AVPHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE);
    visit_groups("", "memory.max", lower_available, &v2);
    visit_groups("memory", "memory.limit_in_bytes", lower_available, &v1);
    return available > SIZE_MAX ? SIZE_MAX : (size_t)available;
}

static void lower_cores(double *cores, double quota, double period)
{
    if (quota > 0 && period > 0 && quota / period < *cores)
        *cores = quota / period;
}

/* cpu.max: "quota period" in microseconds, quota may be "max". */
static void lower_cores_v2(const char *path, void *arg)
{
    char line[64];
    long quota, period;

    if (read_line(path, line, sizeof line) && sscanf(line, "%ld %ld", &quota, &period) == 2)
        lower_cores(arg, (double)quota, (double)period);
}

/* cpu.cfs_quota_us, with the period in the file beside it. */
static void lower_cores_v1(const char *path, void *arg)
{
    char line[64], beside[2 * PATH_BYTES + 32];
    const char *file = strrchr(path, '/');

    if (!read_line(path, line, sizeof line))
        return;
    double quota = (double)strtol(line, NULL, 10);
    snprintf(beside, sizeof beside, "%.*s/cpu.cfs_period_us", (int)(file - path), path);
    if (read_line(beside, line, sizeof line))
        lower_cores(arg, quota, (double)strtol(line, NULL, 10));
}

int host_core_limit(void)
{
    cpu_set_t allowed;
    double cores = (double)sysconf(_SC_NPROCESSORS_ONLN);

    /* Machines of more than 1024 CPUs do not fit the set: all of them, then. */
    if (sched_getaffinity(0, sizeof allowed, &allowed) == 0)
        cores = CPU_COUNT(&allowed);
    visit_groups("", "cpu.max", lower_cores_v2, &cores);
    visit_groups("cpu", "cpu.cfs_quota_us", lower_cores_v1, &cores);
    int whole = (int)cores;
    whole += whole < cores;
    return whole < 1 ? 1 : whole;
}
