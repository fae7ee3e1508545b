"use strict";
/* Asks the network of this page (network.js) about a picture that is dropped, chosen or clicked. */

const held = JSON.parse(document.getElementById("network").textContent);
const network = unpacked(held.constants).then((constants) => new Network(held.network, constants));
const canvas = document.getElementById("seen");
const answer = document.getElementById("answer");
const drop = document.getElementById("drop");

/** The middle square of a picture, as Uint8 [32 * 32 * 3]. */
function pixels(picture, width, height) {
  const side = Math.min(width, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  context.fillStyle = "white";
  context.fillRect(0, 0, 32, 32);
  context.drawImage(picture, (width - side) / 2, (height - side) / 2, side, side, 0, 0, 32, 32);
  return context.getImageData(0, 0, 32, 32).data.filter((_, i) => i % 4 !== 3);
}

function show(logits, milliseconds) {
  const largest = Math.max(...logits);
  const shares = logits.map((logit) => Math.exp(logit - largest));
  const total = shares.reduce((sum, share) => sum + share);
  const likeliest = logits.map((_, i) => i).sort((a, b) => logits[b] - logits[a] || a - b).slice(0, 5);
  answer.replaceChildren(...likeliest.map((i) => {
    const share = (100 * shares[i]) / total;
    const row = Object.assign(document.createElement("div"), { className: "bar" });
    const [name, number, bar, part] = ["span", "span", "div", "i"].map((tag) => document.createElement(tag));
    name.textContent = held.classes[i];
    number.textContent = `${share.toFixed(1)}%`;
    number.className = "n";
    part.style.width = `${share}%`;
    bar.append(part);
    row.append(name, number, bar);
    return row;
  }), Object.assign(document.createElement("p"), { className: "small", textContent: `${milliseconds.toFixed(0)} ms` }));
  answer.dataset.logits = JSON.stringify(logits);
}

async function ask(picture, width, height) {
  const ready = await network;
  const start = performance.now();
  const logits = ready.logits(pixels(picture, width, height));
  show(logits, performance.now() - start);
}

async function read(file) {
  delete answer.dataset.logits;
  if (!file) return;
  try {
    const picture = await createImageBitmap(file);
    await ask(picture, picture.width, picture.height);
  } catch (error) {
    answer.textContent = `${file.name}: not a picture that this browser reads (${error.message})`;
  }
}

document.getElementById("file").addEventListener("change", (event) => read(event.target.files[0]));
for (const kind of ["dragover", "dragleave", "drop"])
  drop.addEventListener(kind, (event) => {
    event.preventDefault();
    drop.classList.toggle("over", kind === "dragover");
    if (kind === "drop") read(event.dataTransfer.files[0]);
  });
// A picture that misses the place must not take the page's.
for (const kind of ["dragover", "drop"]) document.addEventListener(kind, (event) => event.preventDefault());
for (const button of document.querySelectorAll(".sample"))
  button.addEventListener("click", () => {
    const picture = button.querySelector("img");
    ask(picture, picture.naturalWidth, picture.naturalHeight);
  });
