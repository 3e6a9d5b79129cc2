// The camera: a photograph, or live video over a WebSocket, whose labels are shown over the picture.

import { $, element, milliseconds, sentKey } from "./common.js";

const AHEAD = 2; // frames on their way: the server answers one while the next one waits
const SHOWN = 3; // labels over the picture
const FIGURES_MS = 250; // how often the figures and the other card change
const SPOKEN_MS = 2000; // how often a new label is told to a screen reader, at most
const LEAST_SIDE = 240; // of a frame's shorter side, pixels
const UNAUTHORIZED = 4401;
const NORMAL = 1000;

/** `askForKey`, `choose`, `hideError`, `query`, `show`, `showError` and `sideOf` are the page's. */
export function setUpCamera(page) {
  const video = $("video");
  const canvas = document.createElement("canvas");
  const context = canvas.getContext("2d", { alpha: false });
  let pictures = null; // the camera's MediaStream
  let live = null; // the stream under way

  // --- the camera ----------------------------------------------------------------------------------

  async function open(device) {
    page.hideError();
    const wanted = device ? { deviceId: { exact: device } } : { facingMode: "environment" };
    try {
      release();
      pictures = await navigator.mediaDevices.getUserMedia({ video: { ...wanted, frameRate: { ideal: 30 } } });
    } catch (error) {
      close();
      return page.showError(`The camera cannot be used: ${error.message}`);
    }
    video.srcObject = pictures;
    await video.play();
    await listCameras();
    $("view").hidden = $("live").hidden = $("shoot").hidden = false;
    $("target").hidden = true;
    $("camera").textContent = "Close the camera";
  }

  async function listCameras() {
    const cameras = (await navigator.mediaDevices.enumerateDevices()).filter(({ kind }) => kind === "videoinput");
    const current = pictures.getVideoTracks()[0].getSettings().deviceId;
    $("device").replaceChildren(
      ...cameras.map(({ deviceId, label }, number) => new Option(label || `camera ${number + 1}`, deviceId, false, deviceId === current)),
    );
    $("cameras").hidden = cameras.length < 2;
  }

  function release() {
    pictures?.getTracks().forEach((track) => track.stop());
    pictures = null;
  }

  function close() {
    stop();
    release();
    $("view").hidden = $("live").hidden = $("shoot").hidden = $("cameras").hidden = true;
    $("target").hidden = false;
    $("camera").textContent = "Use the camera";
  }

  /** Draw the picture on the canvas, its shorter side no longer than `side`. */
  function draw(side) {
    const scale = Math.min(1, side / Math.min(video.videoWidth, video.videoHeight));
    canvas.width = Math.round(video.videoWidth * scale);
    canvas.height = Math.round(video.videoHeight * scale);
    context.drawImage(video, 0, 0, canvas.width, canvas.height);
  }

  const encoded = (quality) => new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", quality));

  // --- live ----------------------------------------------------------------------------------------

  function start() {
    page.hideError();
    const address = new URL(`stream?${page.query()}`, document.baseURI);
    address.protocol = address.protocol.replace("http", "ws");
    const socket = new WebSocket(address, ["trimrt", ...keyProtocols()]);
    const session = (live = {
      socket, frames: 0, taken: new Map(), under: 0, encoding: false, // on their way: when each frame was taken
      answers: [], dropped: 0, // of the last second; of all
      shownAt: 0, spokenAt: -Infinity, spoken: "",
    });
    socket.onopen = () => nextPicture(session);
    socket.onmessage = ({ data }) => answered(session, JSON.parse(data));
    socket.onclose = ({ code, reason }) => {
      if (live !== session) return;
      stop();
      if (code === UNAUTHORIZED && page.askForKey()) return start();
      if (code !== NORMAL) page.showError(`The stream has ended: ${reason || "the server does not answer."}`);
    };
    $("live").textContent = "Stop live";
    $("answer").ariaLive = "off"; // it changes all the time; #spoken tells what is new
    $("overlay").hidden = $("figures").hidden = false;
  }

  /** The API key as a subprotocol, for a page cannot send headers with a WebSocket. */
  function keyProtocols() {
    const bytes = sentKey();
    if (!bytes) return [];
    const base64 = btoa(String.fromCharCode(...bytes));
    return [`trimrt.key.${base64.replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "")}`];
  }

  function nextPicture(session) {
    if (live !== session) return;
    const again = () => { nextPicture(session); send(session); };
    if (video.requestVideoFrameCallback) video.requestVideoFrameCallback(again);
    else requestAnimationFrame(again);
  }

  /** Send the picture, unless the server, the network or this page is behind. */
  async function send(session) {
    const { socket } = session;
    if (live !== session || session.encoding || session.under >= AHEAD || socket.bufferedAmount) return;
    session.encoding = true;
    session.under++;
    const taken = performance.now();
    draw(Math.max(LEAST_SIDE, page.sideOf()));
    const frame = await encoded(0.85);
    session.encoding = false;
    if (live !== session || socket.readyState !== WebSocket.OPEN) return;
    session.taken.set(session.frames++, taken);
    socket.send(frame);
  }

  function answered(session, answer) {
    if (live !== session) return;
    const now = performance.now();
    session.under -= 1 + answer.dropped;
    session.dropped += answer.dropped;
    session.answers.push({ at: now, latency: now - session.taken.get(answer.frame) });
    while (session.answers[0].at < now - 1000) session.answers.shift();
    for (let number = answer.frame - answer.dropped; number <= answer.frame; number++) session.taken.delete(number);
    if (!answer.results) {
      page.showError(`${answer.title}: ${answer.detail}`);
      return;
    }
    page.hideError();
    const best = answer.results[0].predictions.slice(0, SHOWN);
    const percent = (probability) => `${(probability * 100).toFixed(0)} %`;
    $("overlay").replaceChildren(
      ...best.map(({ label, probability }) => element("li", {}, label, element("b", { textContent: percent(probability) }))),
    );
    if (best[0].label !== session.spoken && now > session.spokenAt + SPOKEN_MS) {
      Object.assign(session, { spoken: best[0].label, spokenAt: now });
      $("spoken").textContent = `${best[0].label}, ${percent(best[0].probability)}`;
    }
    if (now < session.shownAt + FIGURES_MS) return;
    session.shownAt = now;
    const mean = session.answers.reduce((sum, { latency }) => sum + latency, 0) / session.answers.length;
    $("figures").textContent = `${session.answers.length} frames/s · ${milliseconds(mean)} · ${session.dropped} left out`;
    page.show(answer);
  }

  function stop() {
    if (!live) return;
    const { socket } = live;
    live = null;
    socket.close(NORMAL);
    $("live").textContent = "Start live";
    $("answer").ariaLive = "polite";
    $("overlay").hidden = $("figures").hidden = true;
    $("overlay").replaceChildren();
    $("spoken").textContent = "";
  }

  /** Ask the chosen engine from now on; whether live video was under way. */
  function reopen() {
    if (!live) return false;
    stop();
    start();
    return true;
  }

  $("camera").hidden = !navigator.mediaDevices?.getUserMedia;
  $("no-camera").hidden = isSecureContext; // elsewhere browsers have no cameras
  $("camera").addEventListener("click", () => (pictures ? close() : open()));
  $("device").addEventListener("change", () => open($("device").value));
  $("live").addEventListener("click", () => (live ? stop() : start()));
  $("shoot").addEventListener("click", async () => {
    draw(Infinity);
    page.choose(await encoded(0.92), "photograph.jpg");
  });
  return { close, reopen };
}
