"""Checkpoints that are whole or absent: saving in stages, keeping the latest and the best, resuming exactly.

store        save, wait and resume: the stages, and the rule for failed saves
history      the checkpoints of a run folder as a set: latest, best, removed, chosen for a resume
manifest     is every file there, unaltered and harmless
identity     what may change between a checkpoint and its resume
state_files  nested state as JSON and safetensors, bit for bit
host_copies  copies of tensors in host memory, written while training goes on
spool        whole tensors of a sharded model on their way into a checkpoint, on the disk
"""
