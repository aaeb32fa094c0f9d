"""The process around a run: it starts, talks to the other ranks, answers signals, writes its folder, and ends.

process       `start` and `Runtime`: everything below, opened and closed in order
device        which device and precision the machine can serve; the Accelerator on it
random_state  seeds and the state of random generators
ranks         what the processes of one run tell each other
signals       requests to stop, to save, to give up
exits         exit codes, the one line that says why, and which rank prints it
run_folder    where a run writes, and that it may; names of what lies there
run_status    `run_status.json`: how the run stands, or how it ended
run_log       `train.log` and the console
lock          one run at a time in a folder
installed     functions of installed modules, by the name that a recipe gives them
atomic        files that are whole or absent; strict JSON; failed writes as errors
peak_memory   how much memory this process has held at most
"""
