/* What a drive gives a plain program: threads that each read or write every n-th block with O_DIRECT.
 * disk_loop read|write BLOCK_BYTES THREADS FILE_BYTES FILE... ; prints bytes, seconds and CPU seconds. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

static int writes;
static long block, depth, size;

struct worker {
  pthread_t thread;
  int fd;
  long first;
};

static void *work(void *argument) {
  struct worker *me = argument;
  char *memory = aligned_alloc(4096, (size_t)block);
  if (memory == NULL) exit(3);
  memset(memory, 0x5a, (size_t)block);
  for (long at = me->first * block; at + block <= size; at += depth * block) {
    ssize_t moved = writes ? pwrite(me->fd, memory, (size_t)block, at) : pread(me->fd, memory, (size_t)block, at);
    if (moved != block) {
      perror("transfer");
      exit(3);
    }
  }
  free(memory);
  return NULL;
}

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

int main(int count, char **arguments) {
  if (count < 6) return 2;
  writes = strcmp(arguments[1], "write") == 0;
  block = atol(arguments[2]);
  depth = atol(arguments[3]);
  size = atol(arguments[4]);
  int files = count - 5;
  struct worker *workers = calloc((size_t)(files * depth), sizeof *workers);
  if (workers == NULL || block <= 0 || depth <= 0) return 2;
  for (int f = 0; f < files; ++f) {
    int fd = open(arguments[5 + f], O_RDWR | O_DIRECT);
    if (fd < 0) {
      perror(arguments[5 + f]);
      return 3;
    }
    for (long i = 0; i < depth; ++i) workers[f * depth + i] = (struct worker){.fd = fd, .first = i};
  }
  double start = now();
  for (long i = 0; i < files * depth; ++i)
    if (pthread_create(&workers[i].thread, NULL, work, &workers[i]) != 0) return 3;
  for (long i = 0; i < files * depth; ++i) pthread_join(workers[i].thread, NULL);
  double seconds = now() - start;
  struct rusage usage;
  getrusage(RUSAGE_SELF, &usage);
  double cpu = (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
               1e-6 * (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec);
  printf("%ld %.6f %.6f\n", size / block * block * files, seconds, cpu);
  return 0;
}
