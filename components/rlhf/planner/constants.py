"""What no formula gives: sizes of libraries, which were measured once, and sizes on a GPU, which are assumed.

`python -m benchmarks.planner --baselines` measures the first kind on this machine: resident sets of stage programs with a model of no size.
"""

MIB = 2**20

# Measured on a CPU: the interpreter with what a stage imports, and its own small objects.
LIBRARIES = 450 * MIB  # torch and transformers
DEEPSPEED = 150 * MIB
VLLM = 700 * MIB
PEFT = 40 * MIB
EVALUATION = 80 * MIB  # scikit-learn and matplotlib
SMALL_STAGE = 620 * MIB  # prepare_data and judge on some tens of thousands of records
TRACKING = 250 * MIB  # the process that talks to MLflow
LAUNCHER = 260 * MIB  # the process that starts and watches the others
# glibc's heap keeps what is freed, and small tensors that stay split what large ones leave: bytes lost per byte of temporary tensors.
HEAP_LOSS = 0.75
# Logits that are computed at once (models/actor.py).
MAX_LOGITS, MAX_LOGITS_ON_GPU = 2**24, 2**26
NF4_BYTES = 0.5 + 1 / 64 + 4 / 64 / 256  # of a 4-bit weight, with the scales of its blocks
REDUCE_BUCKET = 2**24  # values (engine/torch.py)
CACHE_ROOM = 64  # tokens by which transformers' cache grows (rollout/cache.py)
FROZEN_STATES = 2**30  # bytes at most (components/dpo/states.py)

# DeepSpeed's defaults, in values (zero/config.py); on a CPU only the part that is used takes memory.
DEEPSPEED_BUCKET = 500_000_000
DEEPSPEED_LIVE = 1_000_000_000
DEEPSPEED_PREFETCH = 50_000_000

# Assumed for a GPU; not measured here.
CUDA_CONTEXT = 1024 * MIB  # driver, kernels and workspaces of a process
NCCL = 768 * MIB
VLLM_ASLEEP = 1024 * MIB  # what stays while the engine sleeps: captured graphs and workspaces
VLLM_WORKSPACE = 2048 * MIB  # beside weights and cache, inside its share
CUDA_LIBRARIES = 2500 * MIB  # main memory of a process with CUDA
GPU_FRAGMENTATION = 0.10  # of temporary tensors, lost in torch's caching allocator
