"""One rank of a stock Keras loop: the same network, SGD and images, trained by ``fit`` as a library's guide says.

Usage: python keras_peers.py DEPTH BATCH_A_RANK PRECISION {fit,horovod,multiworker,tfmot}; where the environment has
TF_NUM_INTRAOP_THREADS it sets the threads and the oneDNN switch that our own ranks set, else nothing. multiworker needs
PEER_ADDRESSES, one of each rank.
Request: {"steps": 10}
"""

import json
import os
import sys
import time

from side_by_side import serve

depth, batch, asked, peer = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
rank, size = int(os.environ["HOROVOD_RANK"]), int(os.environ["HOROVOD_SIZE"])
os.environ.update(TF_USE_LEGACY_KERAS="1", TF_CPP_MIN_LOG_LEVEL="3")
if threads := os.environ.get("TF_NUM_INTRAOP_THREADS"):
    # As in cnnopt/distributed/collectives.py: defaults are not compared.
    os.environ.update(TF_ENABLE_ONEDNN_OPTS="1", OMP_NUM_THREADS=threads, TF_NUM_INTEROP_THREADS="2")
if peer == "multiworker":
    workers = {"worker": os.environ["PEER_ADDRESSES"].split(",")}
    os.environ["TF_CONFIG"] = json.dumps({"cluster": workers, "task": {"type": "worker", "index": rank}})

import contextlib  # noqa: E402

import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402
import tf_keras as keras  # noqa: E402

sys.modules["keras"] = keras
from cnnopt.model.precision import choose  # noqa: E402
from cnnopt.model.resnet import resnet  # noqa: E402

if threads:
    tf.config.threading.set_intra_op_parallelism_threads(int(threads))
    tf.config.threading.set_inter_op_parallelism_threads(2)
compute = choose("float32" if peer == "tfmot" else asked, has_gpu=False)
scope: contextlib.AbstractContextManager = contextlib.nullcontext()
callbacks: list[keras.callbacks.Callback] = []
if peer == "multiworker":
    scope = tf.distribute.MultiWorkerMirroredStrategy().scope()
if peer in ("horovod", "tfmot"):
    import horovod.tensorflow.keras as hvd

    hvd.init()
compute.apply()
rng = np.random.default_rng(rank)
images = rng.integers(256, size=(batch, 32, 32, 3)).astype(np.uint8)
labels = rng.integers(10, size=batch)
with scope:
    model = resnet(depth, 10, mean=np.full(3, 128, np.float32), std=np.full(3, 64, np.float32), widen=compute.widen)
    optimizer = keras.optimizers.SGD(1e-3, momentum=0.9, nesterov=True)
    if peer == "tfmot":
        import tensorflow_model_optimization as tfmot

        schedule = tfmot.sparsity.keras.ConstantSparsity(0.6, begin_step=0, frequency=100)

        def prune(layer: keras.layers.Layer) -> keras.layers.Layer:
            """Convolutions and the classifier, as our pruner does; tfmot cannot wrap a user-defined layer."""
            if isinstance(layer, keras.layers.Conv2D):
                layer = keras.layers.Conv2D.from_config(layer.get_config())
            if isinstance(layer, (keras.layers.Conv2D, keras.layers.Dense)):
                return tfmot.sparsity.keras.prune_low_magnitude(layer, pruning_schedule=schedule)
            return layer

        model = keras.models.clone_model(model, clone_function=prune)
        callbacks.append(tfmot.sparsity.keras.UpdatePruningStep())
    if peer in ("horovod", "tfmot"):
        optimizer = hvd.DistributedOptimizer(optimizer)
        callbacks.append(hvd.callbacks.BroadcastGlobalVariablesCallback(0))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"], jit_compile=False)

# One resident batch: the other trainers pay for no input pipeline, while our ranks read and augment images.
if peer == "multiworker":
    # The strategy takes global batches and divides them.
    images, labels = np.concatenate([images] * size), np.concatenate([labels] * size)
stream = tf.data.Dataset.from_tensors((images, labels)).repeat()
options = tf.data.Options()
options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
stream = stream.with_options(options)
if peer == "multiworker":
    strategy = model.distribute_strategy
    shards = strategy.experimental_local_results(next(iter(strategy.experimental_distribute_dataset(stream)))[0])
    assert [len(shard) for shard in shards] == [batch], f"{[len(shard) for shard in shards]} images a rank"


class Clock(keras.callbacks.Callback):
    """From the end of the first step of a ``fit``, which it starts up with, to the end of the last.

    Not to the end of ``fit``, which takes some seconds more at times to be rid of its iterator.
    """

    def on_train_batch_end(self, number, logs=None):
        """Keras has waited for the step: it hands over numbers."""
        self.ended = time.perf_counter()
        if number == 0:
            self.started = self.ended


def block(steps: int) -> dict:
    """``steps`` steps of ``fit``, after one more that is not counted."""
    clock = Clock()
    model.fit(stream, steps_per_epoch=steps + 1, epochs=1, verbose=0, callbacks=[*callbacks, clock])
    return {"seconds": clock.ended - clock.started, "compute": compute.compute}


serve(block)
