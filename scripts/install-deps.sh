#!/bin/sh
# Install what building and testing need and the machine lacks, on Debian 12
# and its relatives.  Nothing is done, and no right is needed, when all is there.
#
#   scripts/install-deps.sh          to build and run
#   scripts/install-deps.sh test     to run `make test` as well
#   scripts/install-deps.sh bench    to run `make bench-cpu` as well
set -eu

# package and a file it brings, to see without asking the package manager
build="gcc:bin/gcc make:bin/make libc6-dev:include/stdio.h libuv1-dev:include/uv.h \
libmicrohttpd-dev:include/microhttpd.h libcjson-dev:include/cjson/cJSON.h \
libutf8proc-dev:include/utf8proc.h libxxhash-dev:include/xxhash.h"
test="check:include/check.h libsubunit-dev:include/subunit/child.h python3:bin/python3 \
python3-venv:share/doc/python3-venv git:bin/git \
clang:bin/clang libclang-rt-14-dev:lib/llvm-14/lib/clang/14.0.6/lib/linux/libclang_rt.fuzzer-x86_64.a \
curl:bin/curl"
bench="libdnnl-dev:include/dnnl.h"

wanted="$build"
case "${1:-}" in
"") ;;
test) wanted="$build $test" ;;
bench) wanted="$build $bench" ;;
*) echo "usage: $0 [test|bench]" >&2; exit 2 ;;
esac

missing=""
for entry in $wanted; do
    file="/usr/${entry#*:}"
    [ -e "$file" ] || missing="$missing ${entry%%:*}"
done
[ -n "$missing" ] || exit 0

if ! command -v apt-get >/dev/null 2>&1; then
    echo "install-deps: no apt-get here; install the equivalents of:$missing" >&2
    exit 1
fi
sudo=""
if [ "$(id -u)" -ne 0 ]; then
    sudo="sudo"
    command -v sudo >/dev/null 2>&1 || {
        echo "install-deps: run as root, or install:$missing" >&2
        exit 1
    }
fi
echo "install-deps: installing$missing"
$sudo apt-get update -qq
# The list is made of words on purpose.
# shellcheck disable=SC2086
DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq --no-install-recommends $missing
