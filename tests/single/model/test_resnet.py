"""The network of the paper: counts, shapes, shortcuts, standardization, and widened convolutions."""

import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras

from cnnopt.model.precision import Precision
from cnnopt.model.resnet import Conv2D, IdentityShortcut, Standardize, pixel_statistics, resnet
from tests.helpers import small_runs

pytestmark = pytest.mark.usefixtures("float32_policy")

MEAN, STD = np.array([125.3, 123.0, 113.9], np.float32), np.array([63.0, 62.1, 66.7], np.float32)


def build(depth: int, num_classes: int = 10, **options: bool) -> keras.Model:
    return resnet(depth, num_classes, mean=MEAN, std=STD, **options)


def trainable_count(model: keras.Model) -> int:
    return sum(int(np.prod(w.shape)) for w in model.trainable_weights)


# Table 6 of He et al. 2016, in millions as printed there, and to the last parameter.
@pytest.mark.parametrize(
    ("depth", "millions", "exact"),
    [(20, "0.27", 269_722), (32, "0.46", 464_154), (44, "0.66", 658_586), (56, "0.85", 853_018),
     (110, "1.7", 1_727_962)],
)  # fmt: skip
def test_parameters_are_those_of_the_paper(depth, millions, exact):
    model = build(depth)
    assert trainable_count(model) == exact
    assert f"{exact / 1e6:.{len(millions) - 2}f}" == millions
    layers = [layer for layer in model.layers if isinstance(layer, (keras.layers.Conv2D, keras.layers.Dense))]
    assert len(layers) == depth


@pytest.mark.parametrize("depth", [8, 14])
def test_depths_of_tests(depth):
    n = (depth - 2) // 6
    blocks = [16 * 16 * 9 * 2 * n, (16 * 32 + 32 * 32 * (2 * n - 1)) * 9, (32 * 64 + 64 * 64 * (2 * n - 1)) * 9]
    norms = 2 * (16 + 2 * n * (16 + 32 + 64))
    assert trainable_count(build(depth)) == 3 * 16 * 9 + sum(blocks) + norms + 64 * 10 + 10


@pytest.mark.parametrize("depth", [2, 7, 21, 43, 0, -4])
def test_other_depths_are_refused(depth):
    with pytest.raises(ValueError, match=f"depth {depth} is not 6n"):
        build(depth)


@pytest.mark.parametrize(
    ("compute", "widen"),
    [("float32", False), ("bfloat16", False), ("bfloat16", True), ("float16", False), ("float16", True)],
)
def test_logits_are_float32_under_every_policy(compute, widen):
    images = small_runs.IMAGES.test_images[:5]
    keras.utils.set_random_seed(1)
    reference = build(8, 100)
    Precision(compute, widen=widen, reason="").apply()
    model = build(8, 100, widen=widen)
    model.set_weights(reference.get_weights())
    logits = model(images)
    assert logits.shape == (5, 100)
    assert logits.dtype == tf.float32
    assert model.output_shape == (None, 100)
    assert model.get_layer("stage2_block1_add").compute_dtype == compute
    assert model.get_layer("stage2_block1_add").output.dtype == compute
    assert {w.dtype for w in model.weights} == {tf.float32}
    # Close to float32, and unless it is float32 itself not equal: the half type is really used.
    expected = reference(images).numpy()
    tolerance = {"float32": 0, "bfloat16": 0.2, "float16": 0.02}[compute]
    np.testing.assert_allclose(logits.numpy(), expected, atol=tolerance * np.abs(expected).max())
    assert np.array_equal(logits.numpy(), expected) == (compute == "float32")


def test_stages_halve_the_image_and_double_the_channels():
    model = build(14)
    shapes = [model.get_layer(f"stage{stage}_block2_relu2").output.shape[1:] for stage in (1, 2, 3)]
    assert shapes == [(32, 32, 16), (16, 16, 32), (8, 8, 64)]


# Shortcuts -----------------------------------------------------------------------------------------------------


def test_option_a_takes_every_second_pixel_and_pads_channels_with_zeros():
    images = np.arange(2 * 4 * 6 * 2, dtype=np.float32).reshape(2, 4, 6, 2)
    out = IdentityShortcut()(images).numpy()
    expected = np.zeros((2, 2, 3, 4), np.float32)
    expected[..., 1:3] = images[:, ::2, ::2]
    np.testing.assert_array_equal(out, expected)
    assert IdentityShortcut().weights == []


@pytest.mark.parametrize("dtype", [tf.float32, tf.bfloat16, tf.float16])
def test_option_a_and_its_gradient_have_the_bits_of_a_slice(dtype):
    rng = np.random.default_rng(0)
    images = tf.cast(rng.standard_normal([3, 8, 8, 4]), dtype)
    upstream = tf.cast(rng.standard_normal([3, 4, 4, 8]), dtype)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(images)
        pooled = IdentityShortcut(dtype=dtype)(images)
        sliced = tf.pad(images[:, ::2, ::2], [[0, 0], [0, 0], [0, 0], [2, 2]])
    assert pooled.numpy().tobytes() == sliced.numpy().tobytes()
    gradients = [tape.gradient(output, images, upstream).numpy() for output in (pooled, sliced)]
    np.testing.assert_array_equal(*gradients)
    assert np.count_nonzero(gradients[0]) == 3 * 4 * 4 * 4


def test_blocks_add_the_shortcut_before_the_last_relu():
    model = build(8)
    for layer in model.layers:
        if layer.name.endswith("conv2_bn"):
            layer.set_weights([np.zeros_like(w) for w in layer.get_weights()])
    names = ("stem_relu", "stage1_block1_relu2", "stage2_block1_relu2", "stage3_block1_relu2")
    stem, one, two, three = keras.Model(model.input, [model.get_layer(name).output for name in names])(
        small_runs.IMAGES.test_images[:2]
    )
    np.testing.assert_array_equal(one, stem)  # nothing but the shortcut is left
    np.testing.assert_array_equal(two[..., 8:24], stem[:, ::2, ::2])
    np.testing.assert_array_equal(three[..., 24:40], stem[:, ::4, ::4])
    assert not np.any(three[..., :24])


# Pixels --------------------------------------------------------------------------------------------------------


def test_channel_statistics_are_numpys():
    images = np.random.default_rng(0).integers(0, [256, 200, 50], size=(30, 32, 32, 3)).astype(np.uint8)
    mean, std = pixel_statistics(images, "channel")
    assert (mean.shape, std.shape, mean.dtype, std.dtype) == ((3,), (3,), np.float32, np.float32)
    np.testing.assert_allclose(mean, images.mean(axis=(0, 1, 2), dtype=np.float64), rtol=1e-6)
    np.testing.assert_allclose(std, images.std(axis=(0, 1, 2), dtype=np.float64), rtol=1e-6)


def test_a_constant_channel_is_not_divided_by_zero():
    mean, std = pixel_statistics(np.full((3, 32, 32, 3), 77, np.uint8), "channel")
    np.testing.assert_array_equal(mean, [77, 77, 77])
    np.testing.assert_array_equal(std, np.float32([1e-3] * 3))


def test_pixel_mean_statistics_are_the_mean_image_and_255():
    images = np.random.default_rng(0).integers(0, 256, size=(30, 32, 32, 3)).astype(np.uint8)
    mean, std = pixel_statistics(images, "pixel-mean")
    assert mean.dtype == std.dtype == np.float32
    np.testing.assert_array_equal(mean, images.mean(axis=0, dtype=np.float64).astype(np.float32))
    np.testing.assert_array_equal(np.broadcast_to(std, mean.shape), np.full((32, 32, 3), 255))


@pytest.mark.parametrize("normalize", ["channel", "pixel-mean"])
@pytest.mark.parametrize(
    ("policy", "rounded"),
    [("float32", np.float32), ("mixed_bfloat16", ml_dtypes.bfloat16), ("mixed_float16", np.float16)],
)
def test_standardize_is_computed_in_float32_and_rounded_once(normalize, policy, rounded):
    images = small_runs.IMAGES.test_images[:9]
    mean, std = pixel_statistics(small_runs.IMAGES.train_images, normalize)
    keras.mixed_precision.set_global_policy(policy)
    layer = Standardize(mean, std)
    # Whole numbers up to 255 are exact in every type; a third of a pixel is not.
    for form in (images, images.astype(np.float32), images.astype(np.float32) / 3):
        expected = ((form.astype(np.float32) - mean) / std).astype(rounded)
        np.testing.assert_array_equal(layer(tf.constant(form)).numpy(), expected)
    assert [w.dtype for w in layer.weights] == [tf.float32, tf.float32]
    assert layer.trainable_weights == []
    np.testing.assert_array_equal(layer.get_weights()[0], mean)


# Wide convolutions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("compute", "half"), [("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16)])
def test_a_wide_convolution_is_the_float32_one_of_rounded_operands(compute, half):
    rng = np.random.default_rng(0)
    images = rng.standard_normal((4, 8, 8, 16)).astype(np.float32)
    kernel = rng.standard_normal((3, 3, 16, 16)).astype(np.float32)
    layer = Conv2D(16, 3, padding="same", use_bias=False, widen=True, dtype=f"mixed_{compute}")
    layer.build(images.shape)
    layer.set_weights([kernel])
    found = layer(tf.constant(images))
    assert found.dtype == tf.float32
    operands = [tf.constant(part.astype(half).astype(np.float32)) for part in (images, kernel)]
    expected = tf.nn.conv2d(*operands, strides=1, padding="SAME").numpy()
    np.testing.assert_array_equal(found.numpy(), expected)
    unrounded = tf.nn.conv2d(images, kernel, strides=1, padding="SAME").numpy()
    assert np.any(found.numpy() != unrounded)


@pytest.mark.parametrize("compute", ["bfloat16", "float16"])
@pytest.mark.parametrize("widen", [False, True])
def test_activations_are_rounded_to_the_half_type_whatever_the_convolutions_run_in(compute, widen):
    keras.mixed_precision.set_global_policy(f"mixed_{compute}")
    model = resnet(8, 10, mean=np.zeros(3, np.float32), std=np.ones(3, np.float32), widen=widen)
    types = {type(layer).__name__: layer.output.dtype for layer in model.layers}
    wide = tf.float32 if widen else compute
    assert types["Conv2D"] == types["BatchNormalization"] == wide
    assert types["ReLU"] == types["Add"] == types["GlobalAveragePooling2D"] == compute
    assert types["Dense"] == tf.float32


def test_a_float32_convolution_is_keras_own():
    images = np.random.default_rng(0).standard_normal((2, 8, 8, 3)).astype(np.float32)
    layer = Conv2D(4, 3, widen=False)
    np.testing.assert_array_equal(layer(images), tf.nn.conv2d(images, layer.kernel, 1, "VALID") + layer.bias)
