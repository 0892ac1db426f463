"""From the learner to the engines: snapshot, shared memory, NCCL and IPC, and the proof that the weights arrived."""
