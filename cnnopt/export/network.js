"use strict";
/* Runs the int8 network of a .tflite file, as cnnopt.export.tflite_file.network describes it, on one image.

   Rounds as XNNPACK does: products and sums in int32, times a float32 scale, to the nearest, halves to even; sums of two
   tensors with multipliers of 21 bits. Activations lie plane by plane: [channel][row][column]. */

const f32 = Math.fround;
const ROUNDING = 12582912; // 1.5 * 2 ** 23: adding it to a float32 leaves no bits for what is below one
const nearest = (value) => f32(f32(value) + ROUNDING) - ROUNDING;
const clamp = (value, low) => (value < low ? low : value > 127 ? 127 : value);

/** Bytes of what gzip and base64 have been applied to. */
async function unpacked(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

class Network {
  /** `description`: operators and tensors; `constants`: ArrayBuffer of what the tensors hold. */
  constructor(description, constants) {
    this.operators = description.operators;
    this.input = description.input;
    this.output = description.output;
    this.tensors = description.tensors.map((tensor) => {
      const [start, length] = tensor.at || [0, 0];
      const part = constants.slice(start, start + length);
      const data = !length ? null : tensor.type === "int32" ? new Int32Array(part) : new Int8Array(part);
      return { ...tensor, data, scale: tensor.scale.map(f32) };
    });
    this.taps = this.operators.map((operator) => (operator.name === "CONV_2D" ? this.nonzero(operator) : null));
  }

  /** For each output channel the weights that are not zero: [row, column, input channel, weight]; zeros cost nothing. */
  nonzero(operator) {
    const { shape, data } = this.tensors[operator.inputs[1]];
    const [count, height, width, depth] = shape;
    return Array.from({ length: count }, (_, channel) => {
      const taps = [];
      for (let i = 0; i < height * width * depth; i++) {
        const weight = data[channel * height * width * depth + i];
        if (weight) taps.push([Math.floor(i / (width * depth)), Math.floor(i / depth) % width, i % depth, weight]);
      }
      return taps;
    });
  }

  /** int8 logits of an image, Uint8 [32 * 32 * 3], pixel by pixel. */
  run(pixels) {
    const [, height, width, depth] = this.tensors[this.input].shape;
    const { scale, zero } = this.tensors[this.input];
    const first = new Int8Array(pixels.length);
    for (let c = 0; c < depth; c++)
      for (let i = 0; i < height * width; i++)
        first[c * height * width + i] = clamp(nearest(f32(pixels[i * depth + c] / scale[0])) + zero, -128);
    const values = new Map([[this.input, first]]);
    this.operators.forEach((operator, i) => {
      const x = values.get(operator.inputs[0]);
      values.set(operator.output, this[operator.name](operator, x, values, this.taps[i]));
    });
    return values.get(this.output);
  }

  /** float32 logits. */
  logits(pixels) {
    const { scale, zero } = this.tensors[this.output];
    return Array.from(this.run(pixels), (code) => (code - zero) * scale[0]);
  }

  lowest(operator) {
    return operator.relu ? Math.max(-128, this.tensors[operator.output].zero) : -128;
  }

  /** int32 sums to int8; `scale` is what a sum counts for in steps of the output. */
  rescaled(sum, scale, operator) {
    const { zero } = this.tensors[operator.output];
    return clamp(nearest(f32(f32(sum) * scale)) + zero, this.lowest(operator));
  }

  CONV_2D(operator, x, values, taps) {
    const [source, kernel, bias] = operator.inputs.map((i) => this.tensors[i]);
    const target = this.tensors[operator.output];
    const [, height, width, depth] = source.shape;
    const [, rows, columns, count] = target.shape;
    const [, high, wide] = kernel.shape;
    const [down, right] = operator.stride;
    const before = (out, stride, size, length) =>
      operator.same ? Math.floor(Math.max(0, (out - 1) * stride + size - length) / 2) : 0;
    const top = before(rows, down, high, height);
    const left = before(columns, right, wide, width);
    // With a margin of zeros, so that no tap has to look where the image ends.
    const tall = (rows - 1) * down + high;
    const long = (columns - 1) * right + wide;
    const padded = new Int32Array(depth * tall * long);
    for (let c = 0; c < depth; c++)
      for (let y = 0; y < Math.min(height, tall - top); y++)
        for (let z = 0; z < Math.min(width, long - left); z++)
          padded[(c * tall + y + top) * long + z + left] = x[(c * height + y) * width + z] - source.zero;
    const result = new Int8Array(count * rows * columns);
    const sums = new Int32Array(rows * columns);
    for (let channel = 0; channel < count; channel++) {
      sums.fill(bias.data[channel]);
      for (const [ky, kx, c, weight] of taps[channel])
        for (let y = 0, to = 0; y < rows; y++)
          for (let z = 0, from = (c * tall + y * down + ky) * long + kx; z < columns; z++, from += right)
            sums[to++] += weight * padded[from];
      const scale = this.product(source, kernel, channel, target);
      for (let i = 0; i < sums.length; i++)
        result[channel * sums.length + i] = this.rescaled(sums[i], scale, operator);
    }
    return result;
  }

  product(source, kernel, channel, target) {
    const own = kernel.scale[kernel.scale.length > 1 ? channel : 0];
    return f32(f32(source.scale[0] * own) / target.scale[0]);
  }

  FULLY_CONNECTED(operator, x) {
    const [source, kernel, bias] = operator.inputs.map((i) => this.tensors[i]);
    const target = this.tensors[operator.output];
    const [count, depth] = kernel.shape;
    return Int8Array.from({ length: count }, (_, channel) => {
      let sum = bias.data[channel];
      for (let c = 0; c < depth; c++) sum += kernel.data[channel * depth + c] * (x[c] - source.zero);
      return this.rescaled(sum, this.product(source, kernel, channel, target), operator);
    });
  }

  /** The second operand as a function of the index of the first: a tensor, or a constant for a channel or a pixel. */
  other(operator, values) {
    const second = this.tensors[operator.inputs[1]];
    if (!second.data) {
      const y = values.get(operator.inputs[1]);
      return (i) => y[i];
    }
    const shape = this.tensors[operator.inputs[0]].shape;
    const [, height, width, depth] = shape;
    const plane = height * width;
    if (second.data.length === 1) return () => second.data[0];
    if (second.data.length === depth) return (i) => second.data[Math.floor(i / plane)];
    return (i) => second.data[(i % plane) * depth + Math.floor(i / plane)];
  }

  MUL(operator, x, values) {
    const [a, b] = operator.inputs.map((i) => this.tensors[i]);
    const scale = this.product(a, b, 0, this.tensors[operator.output]);
    const y = this.other(operator, values);
    return x.map((value, i) => this.rescaled((value - a.zero) * (y(i) - b.zero), scale, operator));
  }

  SUB(operator, x, values) {
    return this.sum(operator, x, values, -1);
  }

  ADD(operator, x, values) {
    return this.sum(operator, x, values, 1);
  }

  sum(operator, x, values, sign) {
    const [a, b] = operator.inputs.map((i) => this.tensors[i]);
    const target = this.tensors[operator.output];
    const [first, second] = [a, b].map((tensor) => f32(tensor.scale[0] / target.scale[0]));
    const shift = 20 - Math.floor(Math.log2(Math.max(first, second)));
    const multiplier = Math.round(first * 2 ** shift);
    const by = sign * Math.round(second * 2 ** shift);
    const bias = 2 ** (shift - 1) - multiplier * a.zero - by * b.zero;
    const y = this.other(operator, values);
    const low = this.lowest(operator);
    return x.map((value, i) =>
      clamp(Math.floor((bias + multiplier * value + by * y(i)) / 2 ** shift) + target.zero, low));
  }

  /** Windows of one pixel: every other one is taken. */
  AVERAGE_POOL_2D(operator, x) {
    const [, height, width] = this.tensors[operator.inputs[0]].shape;
    const [, rows, columns, depth] = this.tensors[operator.output].shape;
    const [down, right] = operator.stride;
    return Int8Array.from({ length: depth * rows * columns }, (_, i) => {
      const [c, y, z] = [Math.floor(i / (rows * columns)), Math.floor(i / columns) % rows, i % columns];
      return x[(c * height + y * down) * width + z * right];
    });
  }

  /** New channels of zeros. */
  PAD(operator, x) {
    const [, rows, columns, depth] = this.tensors[operator.output].shape;
    const before = this.tensors[operator.inputs[1]].data[6];
    const result = new Int8Array(depth * rows * columns).fill(this.tensors[operator.output].zero);
    result.set(x, before * rows * columns);
    return result;
  }

  MEAN(operator, x) {
    const [source, target] = [operator.inputs[0], operator.output].map((i) => this.tensors[i]);
    const [, height, width, depth] = source.shape;
    const plane = height * width;
    const scale = f32(source.scale[0] / f32(target.scale[0] * plane));
    return Int8Array.from({ length: depth }, (_, c) => {
      let sum = -plane * source.zero;
      for (let i = 0; i < plane; i++) sum += x[c * plane + i];
      return this.rescaled(sum, scale, operator);
    });
  }
}
