"""Starting a run on GPUs, SLURM, TPUs, GKE and Colab: README.md; installed as `allattn.launch`."""
