// Sends a file in parts that the service asks for, goes on where it stopped, and tells how it stands. No rules live here.
(() => {
  "use strict";
  const form = document.querySelector("form[data-upload]");
  if (!form) return;
  const LONGEST_PAUSE_MS = 30000;
  const HASHED_BYTES = 256 * 2 ** 20;
  const POLL_MS = 1000;
  const part = (id) => document.getElementById(`upload-${id}`);
  const [progress, status, send, stop] = ["progress", "status", "send", "stop"].map(part);
  let stopping = false;
  let current = null;

  const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
  const tell = (text, kind = "") => {
    if (status.textContent !== text) status.textContent = text;
    status.className = `small ${kind}`;
  };
  const size = (bytes) => (bytes < 1e6 ? `${(bytes / 1e3).toFixed(1)} kB` : `${(bytes / 1e6).toFixed(1)} MB`);

  // -- asking the service: answers that it will not change are errors, silence is tried again -------------------------
  class Refused extends Error {}

  const ask = async (method, url, { body, headers = {} } = {}) => {
    const token = form.querySelector("[name=csrfmiddlewaretoken]").value;
    const response = await fetch(url, { method, body, headers: { "X-CSRFToken": token, ...headers }, cache: "no-store" });
    if (response.ok) return response.json();
    const problem = await response.json().catch(() => ({ detail: `the service answered ${response.status}` }));
    if (response.status === 409 && method === "PUT") return null; // another offset is wanted: look, then go on
    if (response.status >= 500 || response.status === 429) throw new Error(problem.detail);
    const field = problem.fields?.[0]?.field;
    throw new Refused(field && !problem.detail.startsWith(field) ? `${field}: ${problem.detail}` : problem.detail);
  };
  const patiently = async (...question) => {
    for (let wait = 1000; ; wait = Math.min(wait * 2, LONGEST_PAUSE_MS)) {
      try {
        return await ask(...question);
      } catch (error) {
        if (error instanceof Refused || stopping) throw error;
        tell("The connection is lost; trying again …", "text-bad");
        await pause(wait * (0.5 + Math.random()));
      }
    }
  };

  // -- one upload ---------------------------------------------------------------------------------------------------
  const keyOf = (file) => `upload:${form.dataset.upload}:${file.name}:${file.size}:${file.lastModified}`;
  const remembered = (key) => {
    try {
      return localStorage.getItem(key);
    } catch {
      return null; // storage may be forbidden; then an upload starts anew
    }
  };
  const remember = (key, id) => {
    try {
      if (id) localStorage.setItem(key, id);
      else localStorage.removeItem(key);
    } catch {
      // As above.
    }
  };
  const digestOf = async (file) => {
    if (!window.crypto?.subtle || file.size > HASHED_BYTES) return "";
    const bytes = new Uint8Array(await crypto.subtle.digest("SHA-256", await file.arrayBuffer()));
    return [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  };
  const optionsOf = (file) => {
    const given = Object.fromEntries(new FormData(form));
    if (file.name.endsWith(".npz")) return { labels_key: given.labels_key, inputs_key: given.inputs_key };
    const passes = given.passes ? [given.passes] : [];
    if (file.name.includes(".ortpackage")) return { passes };
    return { name: given.name, precision: given.precision || "fp32", base: given.base, passes };
  };
  const begin = async (file) => {
    const known = remembered(keyOf(file));
    if (known) {
      const found = await patiently("GET", `/api/v1/uploads/${known}`).catch(() => null);
      if (found?.state === "receiving") return found;
    }
    const body = { file_name: file.name, size_bytes: file.size, sha256: await digestOf(file), options: optionsOf(file) };
    const headers = { "Content-Type": "application/json" };
    const upload = await patiently("POST", form.dataset.upload, { body: JSON.stringify(body), headers });
    remember(keyOf(file), upload.id);
    return upload;
  };
  const show = (upload) => {
    const share = upload.received_bytes / upload.size_bytes;
    progress.value = share;
    tell(`${Math.floor(share * 100)} % of ${size(upload.size_bytes)} sent`);
  };
  const sendParts = async (file, started) => {
    let upload = started;
    const url = `/api/v1/uploads/${upload.id}`;
    while (upload.state === "receiving" && !stopping) {
      show(upload);
      const first = upload.received_bytes;
      const last = Math.min(first + upload.part_bytes, file.size) - 1;
      const headers = { "Content-Range": `bytes ${first}-${last}/${file.size}`, "Content-Type": "application/octet-stream" };
      const answer = await patiently("PUT", url, { body: file.slice(first, last + 1), headers });
      upload = answer || (await patiently("GET", url));
    }
    return upload;
  };
  const follow = async (sent) => {
    let upload = sent;
    while (["queued", "running"].includes(upload.state) && !stopping) {
      progress.removeAttribute("value");
      tell(upload.state === "queued" ? "Sent. Waiting for a worker …" : "Sent. Being checked and measured …");
      await pause(POLL_MS);
      upload = await patiently("GET", `/api/v1/uploads/${upload.id}`);
    }
    return upload;
  };
  const conclude = (upload) => {
    if (upload.state === "done") {
      tell(upload.variant ? `Taken in as ${upload.variant}. ${upload.error}` : "Taken in.", "text-ok");
      form.reset();
    } else tell(`${upload.state}: ${upload.error || "nothing was taken in"}`, "text-bad");
  };

  const busy = (isBusy) => {
    send.disabled = isBusy;
    progress.hidden = stop.hidden = !isBusy;
  };
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const file = form.elements.file.files[0];
    stopping = false;
    progress.value = 0;
    busy(true);
    tell("Announcing the file …");
    try {
      current = await begin(file);
      const ended = await follow(await sendParts(file, current));
      remember(keyOf(file), null);
      conclude(ended);
    } catch (error) {
      tell(stopping ? "Cancelled." : error.message, stopping ? "" : "text-bad");
    }
    current = null;
    busy(false);
    send.focus();
  });
  stop.addEventListener("click", async () => {
    stopping = true;
    if (current) await ask("DELETE", `/api/v1/uploads/${current.id}`).catch(() => null);
  });
})();
