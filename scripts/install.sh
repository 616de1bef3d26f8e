# Sourced by demo.sh and test.sh from the checkout's root: makes .venv once, installs the package into it, activates it.
# Usage: . scripts/install.sh [extra]
extra="${1:-}"
python="${PYTHON:-python3}"
if ! "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
  echo "Python 3.10 to 3.13 is needed; found: $("$python" --version 2>&1). Set PYTHON=/path/to/python3." >&2
  exit 1
fi
if ! .venv/bin/python -m pip --version > /dev/null 2>&1; then
  echo "Making .venv ..."
  "$python" -m venv --clear .venv
fi
. .venv/bin/activate
# a stamp per extra holds what was installed: a second run is quick, a changed pyproject or start-up file installs again
wanted="$(cat pyproject.toml startup/*.* startup/_nnunet_dgplugins_ext/*.py | cksum)"
installed=""
for stamp in ".venv/dgplugins-installed${extra:+-$extra}" .venv/dgplugins-installed-test; do
  if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then installed=yes; fi
done
if [ -z "$installed" ]; then
  echo "Installing nnunet_dgplugins and nnU-Net into .venv (about 7 GB with PyTorch, a few minutes) ..."
  python -m pip install --quiet --disable-pip-version-check -e ".${extra:+[$extra]}"
  printf '%s' "$wanted" > ".venv/dgplugins-installed${extra:+-$extra}"
fi
