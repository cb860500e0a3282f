"""Processes that have imported everything when they start.

It takes longer to import torch and SpeechBrain than to train so little.

Authors
 * The sb_memeff authors 2026
"""

import os
import runpy
import sys

import torch
import torch.multiprocessing as mp

# bitsandbytes initialises CUDA when it is imported, and CUDA does not survive a
# fork: where there is a GPU each process imports for itself.
METHOD = "spawn" if torch.cuda.is_available() else "forkserver"
PRELOADED = ["sb_memeff.brain", "sb_memeff.export.speaker_folder", "torchaudio"]


def context():
    """A multiprocessing context."""
    found = mp.get_context(METHOD)
    found.set_forkserver_preload(PRELOADED)
    return found


def start_script(argv, folder, output, environment):
    """Starts a script as ``python script arguments`` does.

    Arguments
    ---------
    argv : list of str
        The script's path and its arguments.
    folder : Path
        Working folder.
    output : Path
        File for what the script prints.
    environment : dict
        Variables that are added to those of this process.

    Returns
    -------
    multiprocessing.Process
        The process.
    """
    process = context().Process(
        target=_run_script, args=(argv, folder, output, environment)
    )
    process.start()
    return process


def _run_script(argv, folder, output, environment):
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(file, number)
    os.chdir(folder)
    os.environ.update(environment)
    # Torch reads the variable when it is imported.
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    # For workers of data loaders: as in a program that a user starts.
    mp.set_start_method("fork", force=True)
    sys.argv = argv
    sys.path.insert(0, os.path.dirname(argv[0]))
    runpy.run_path(argv[0], run_name="__main__")
