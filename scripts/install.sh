# Sourced by demo.sh and test.sh from the checkout's root: makes .venv once, installs the package into it, activates it.
# Usage: . scripts/install.sh [extra]
extra="${1:-}"
python="${PYTHON:-python3}"
if ! "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
  echo "Python 3.10 to 3.13 is needed; found: $("$python" --version 2>&1). Set PYTHON=/path/to/python3." >&2
  exit 1
fi
if [ ! -x .venv/bin/python ]; then
  echo "Making .venv ..."
  "$python" -m venv .venv
fi
. .venv/bin/activate
# the stamp holds what was installed, so that a second run is quick and a changed pyproject installs again
wanted="$(cat pyproject.toml startup/*.* startup/_nnunet_dgplugins_ext/*.py | cksum) ${extra}"
if [ "$(cat .venv/dgplugins-installed 2>/dev/null)" != "$wanted" ]; then
  echo "Installing nnunet_dgplugins and nnU-Net into .venv (about 7 GB with PyTorch, a few minutes) ..."
  python -m pip install --quiet --disable-pip-version-check -e ".${extra:+[$extra]}"
  printf '%s' "$wanted" > .venv/dgplugins-installed
fi
