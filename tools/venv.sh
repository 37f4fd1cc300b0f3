#!/bin/sh
# Make .venv from the lock files, or return at once if it is up to date. The Makefile calls this.
#
#   tools/venv.sh                      python3 if it is 3.11 to 3.13, else the newest of those found
#   PYTHON=python3.12 tools/venv.sh    that interpreter, whatever else is installed
#
# What was installed is remembered by content, not by time, so that a fresh checkout, a copied
# folder or an interrupted run cannot pass for a finished one.
set -eu
cd "$(dirname "$0")/.."

venv=.venv
stamp=$venv/.fsn_jax
say() { printf '%s\n' "$*" >&2; }
fail() { say "error: $1"; shift; for line in "$@"; do say "  $line"; done; exit 1; }

# Prints "3.12.1"; fails for a name that is absent or a shim with nothing behind it.
version_of() { "$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null; }

# Prints "old", "tested" or "new" for a version.
class_of() {
  case $1 in
    3.1[123].*) echo tested ;;
    3.[0-9].* | 3.10.* | [012].*) echo old ;;
    *) echo new ;;
  esac
}

has_venv() { "$1" -c 'import ensurepip, venv' 2>/dev/null; }

choose_python() {
  found= bare=
  for candidate in python3 python3.13 python3.12 python3.11 python; do
    version=$(version_of "$candidate") || continue
    case $(class_of "$version") in
      tested) if has_venv "$candidate"; then echo "$candidate"; return; fi; bare="$bare $candidate" ;;
      *) found="$found $candidate ($version)" ;;
    esac
  done
  for candidate in python3 python3.14; do
    version=$(version_of "$candidate") || continue
    if [ "$(class_of "$version")" = new ] && has_venv "$candidate"; then
      say "note: Python $version is newer than the versions this project is tested on (3.11 to 3.13)."
      echo "$candidate"
      return
    fi
  done
  [ -z "$bare" ] || no_venv "$bare"
  fail "Python 3.11 or newer is needed; found:${found:- none}." \
    "Install one (your package manager, python.org, pyenv, conda or uv all do), then run make again," \
    "or name one that is not on PATH: make PYTHON=/path/to/python3.12 ..."
}

no_venv() {
  fail "this Python cannot make virtual environments (no venv or ensurepip module): ${1# }." \
    "On Debian and Ubuntu: apt install python3-venv (or python3.12-venv, to match the version)." \
    "Or name another interpreter: make PYTHON=/path/to/python3.12 ..."
}

if [ -n "${PYTHON:-}" ]; then
  version=$(version_of "$PYTHON") || fail "PYTHON=$PYTHON does not run: no such interpreter."
  [ "$(class_of "$version")" != old ] ||
    fail "PYTHON=$PYTHON is Python $version; 3.11 or newer is needed."
fi

# Of pyproject.toml, what comes before the tools' settings: those need no new installation.
wanted="$({ cat requirements-build.lock requirements.lock; sed '/^\[tool.ruff\]/q' pyproject.toml; } | cksum) $PWD"
current=$(version_of $venv/bin/python) || current=
if [ -n "$current" ] && { [ -z "${PYTHON:-}" ] || [ "$current" = "$version" ]; }; then
  if [ "$(cat $stamp 2>/dev/null)" = "$wanted $current" ]; then exit 0; fi
fi

if [ -z "$current" ] || [ "$(class_of "$current")" = old ] ||
  { [ -n "${PYTHON:-}" ] && [ "$current" != "$version" ]; } ||
  ! $venv/bin/python -m pip --version >/dev/null 2>&1; then
  [ -n "${PYTHON:-}" ] || PYTHON=$(choose_python)
  version=$(version_of "$PYTHON")
  has_venv "$PYTHON" || no_venv "$PYTHON"
  say "Making $venv with $PYTHON ($version)."
  rm -rf $venv
  "$PYTHON" -m venv $venv || fail "$PYTHON could not make $venv (its own message is above)."
  current=$version
fi

rm -f $stamp
say "Installing the locked requirements (about 300 MB to download the first time)."
quiet=--quiet
if [ -t 1 ]; then quiet=; fi

# PIP_USER would be refused in a virtual environment; some machines set it for everyone.
pip() { PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1 $venv/bin/python -m pip install $quiet "$@"; }
cannot() {
  fail "pip could not install $1 (its own message is above)." \
    "The first set-up needs the network; a mirror or proxy is set as for any pip (pip config, PIP_INDEX_URL)." \
    "JAX has wheels for Linux (glibc) on x86_64 and aarch64 and for macOS on arm64." \
    "Run make again to go on; what was downloaded is kept in pip's cache."
}
# The build backend first, itself locked: nothing is built with packages that were not hash-checked.
pip --require-hashes -r requirements-build.lock || cannot "the build backend"
pip --require-hashes --no-build-isolation --use-pep517 -r requirements.lock || cannot "the locked requirements"
pip --no-deps --no-build-isolation --editable . || cannot "the project itself"

printf '%s\n' "$wanted $current" >$stamp
say "Ready: $venv (Python $current)."
