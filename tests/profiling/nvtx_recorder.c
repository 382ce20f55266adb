/* A tool that NVTX loads (NVTX_INJECTION64_PATH) in the place of a profiler: it writes down each range that is pushed
 * or popped, one line of NVTX_RECORD each:
 *
 *     process thread push domain name
 *     process thread pop domain
 */

#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <nvtx3/nvToolsExt.h>

/* Handles of domains and registered strings are opaque to the program: here they are the texts themselves. */
struct nvtxDomainRegistration_st {
    char name[64];
};
struct nvtxStringRegistration_st {
    char text[64];
};

static int record = -1;

/* One write each: lines of several threads and processes do not mix in a file that is appended to. */
static void write_line(const char *what, nvtxDomainHandle_t domain, const char *name) {
    char line[256];
    int length = snprintf(line, sizeof line, "%d %ld %s %s%s%s\n", (int)getpid(), (long)syscall(SYS_gettid), what,
                          domain ? domain->name : "(default)", name ? " " : "", name ? name : "");
    if (length < 0 || write(record, line, (size_t)length) != length) abort();
}

static nvtxDomainHandle_t NVTX_API create_domain(const char *name) {
    nvtxDomainHandle_t domain = calloc(1, sizeof *domain);
    if (!domain) abort();
    strncpy(domain->name, name, sizeof domain->name - 1);
    return domain;
}

static nvtxStringHandle_t NVTX_API register_string(nvtxDomainHandle_t domain, const char *text) {
    (void)domain;
    nvtxStringHandle_t string = calloc(1, sizeof *string);
    if (!string) abort();
    strncpy(string->text, text, sizeof string->text - 1);
    return string;
}

static int NVTX_API push(nvtxDomainHandle_t domain, const nvtxEventAttributes_t *event) {
    const char *name = "?";
    if (event->messageType == NVTX_MESSAGE_TYPE_REGISTERED) name = event->message.registered->text;
    if (event->messageType == NVTX_MESSAGE_TYPE_ASCII) name = event->message.ascii;
    write_line("push", domain, name);
    return 0;
}

static int NVTX_API pop(nvtxDomainHandle_t domain) {
    write_line("pop", domain, NULL);
    return 0;
}

/* What NVTX calls when the program first uses it. */
__attribute__((visibility("default"))) int InitializeInjectionNvtx2(NvtxGetExportTableFunc_t get_table) {
    const char *path = getenv("NVTX_RECORD");
    const NvtxExportTableCallbacks *callbacks = get_table(NVTX_ETID_CALLBACKS);
    NvtxFunctionTable functions;
    unsigned int size;
    if (!path || !callbacks || !callbacks->GetModuleFunctionTable(NVTX_CB_MODULE_CORE2, &functions, &size)) return 0;
    if (size <= NVTX_CBID_CORE2_DomainCreateA) return 0;
    record = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (record < 0) return 0;
    *functions[NVTX_CBID_CORE2_DomainCreateA] = (NvtxFunctionPointer)create_domain;
    *functions[NVTX_CBID_CORE2_DomainRegisterStringA] = (NvtxFunctionPointer)register_string;
    *functions[NVTX_CBID_CORE2_DomainRangePushEx] = (NvtxFunctionPointer)push;
    *functions[NVTX_CBID_CORE2_DomainRangePop] = (NvtxFunctionPointer)pop;
    return 1;
}
