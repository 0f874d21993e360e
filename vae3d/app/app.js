"use strict";
// The page of `vae3d app`: uploads a file, follows a job, shows the page that the job wrote in a frame.
// All texts from outside (names, messages) are put in by textContent.
(() => {
  const POLL = 250; // milliseconds
  // In the comparison's page: what the page around it says already.
  const INSIDE = "h1, details.contents, #chapter-1-player > h3, .videos-tools { display: none } .chapter { padding-top: 1rem }";
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  let source = null; // {kind, key, name}: the chosen file
  let job = null; // the job that is followed
  let shown = null; // the job whose result is shown
  let uploading = null; // the request of the running upload
  let asking = false; // whether a job is being submitted
  let nextNoise = false; // whether the slider moved while a job was running

  const element = (tag, text, attributes = {}) => {
    const made = Object.assign(document.createElement(tag), attributes);
    if (text) made.textContent = text;
    return made;
  };

  const showError = (text) => {
    $("error").textContent = text;
    $("error").hidden = !text;
  };

  const showState = (text, fraction) => {
    $("state").hidden = text === null;
    if (text === null) return;
    $("state-text").textContent = text;
    if (fraction === null) $("bar").removeAttribute("value");
    else $("bar").value = fraction;
  };

  const megabytes = (bytes) => `${(bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0)} MB`;

  async function ask(method, path, body) {
    let response;
    try {
      response = await fetch(path, {
        method,
        headers: body ? { "Content-Type": "application/json" } : {},
        body: body ? JSON.stringify(body) : undefined,
      });
    } catch {
      throw new Error("The server does not answer. Does `vae3d app` still run?");
    }
    const text = await response.text();
    let answer;
    try {
      answer = JSON.parse(text);
    } catch {
      answer = { error: text.trim() || response.statusText };
    }
    if (!response.ok) throw Object.assign(new Error(answer.error || response.statusText), { status: response.status });
    return answer;
  }

  // ---- the file

  function choose(chosen) {
    source = chosen;
    $("chosen").textContent = chosen ? `${chosen.name} (${megabytes(chosen.size)})` : "";
    $("chosen").hidden = !chosen;
    if (!chosen || chosen.kind !== "listed") $("listed").value = "";
    update();
  }

  // "from frame" was meant for the file before.
  function chooseOther(chosen) {
    $("start").value = data.defaults.start;
    choose(chosen);
  }

  function upload(file) {
    showError("");
    if (uploading) uploading.abort();
    const suffix = (file.name.match(/\.[^.]*$/) || [""])[0].toLowerCase();
    if (!data.suffixes.includes(suffix)) {
      showError(`${file.name}: ${suffix ? `${suffix} files` : "files without a suffix"} cannot be read; known: ${data.suffixes.join(" ")}`);
      return;
    }
    if (file.size > data.limits.upload) {
      showError(`${file.name} has ${megabytes(file.size)}; the limit is ${megabytes(data.limits.upload)} (--max_upload changes it)`);
      return;
    }
    chooseOther(null);
    const request = (uploading = new XMLHttpRequest());
    request.open("PUT", `/api/uploads?name=${encodeURIComponent(file.name)}`);
    request.responseType = "json";
    request.upload.onprogress = (event) => showState(`uploading ${file.name}`, event.loaded / event.total);
    request.onloadend = () => {
      if (request !== uploading) return;
      uploading = null;
      showState(null);
      if (request.status === 200) choose({ kind: "upload", ...request.response });
      else if (request.status) showError((request.response && request.response.error) || `The upload failed (${request.status})`);
      else showError("The upload was broken off. Does `vae3d app` still run?");
      update();
    };
    request.send(file);
    update();
  }

  function setUpFiles() {
    $("file").accept = data.suffixes.join(",");
    $("file").onchange = () => {
      if ($("file").files.length) upload($("file").files[0]);
      $("file").value = "";
    };
    takeDrops(window);
  }

  let depth = 0; // of elements that a dragged file is over

  // Files dropped anywhere, also on the comparison, which is a window of its own.
  function takeDrops(target) {
    const enter = (count) => {
      depth = Math.max(0, count);
      document.body.classList.toggle("over-page", depth > 0);
    };
    target.addEventListener("dragenter", (event) => event.dataTransfer.types.includes("Files") && enter(depth + 1));
    target.addEventListener("dragleave", () => enter(depth - 1));
    target.addEventListener("dragover", (event) => event.preventDefault());
    target.addEventListener("drop", (event) => {
      event.preventDefault();
      enter(0);
      if (event.dataTransfer.files.length) upload(event.dataTransfer.files[0]);
    });
  }

  function list(files) {
    $("listed-row").hidden = !files.length;
    $("listed").replaceChildren(element("option", "choose ...", { value: "" }));
    for (const file of files) $("listed").append(element("option", file.name, { value: file.key }));
    $("listed").onchange = () => {
      const file = files.find((candidate) => candidate.key === $("listed").value);
      chooseOther(file ? { kind: "listed", ...file } : null);
    };
  }

  // ---- the settings

  function setUpSettings() {
    data.checkpoints.forEach((checkpoint, index) => {
      const label = element("label", "", { className: "check" });
      const box = element("input", "", { type: "checkbox", name: "checkpoint", value: index, checked: true });
      const text = element("span");
      text.append(element("b", checkpoint.name), element("small", checkpoint.facts));
      label.append(box, text);
      $("checkpoints").append(label);
    });
    for (const name of ["frames", "height"]) {
      $(name).max = data.limits[name];
      $(name).value = Math.min(data.defaults[name], data.limits[name]);
    }
    $("start").value = data.defaults.start;
    $("noise").max = data.max_noise;
    $("form").oninput = update;
  }

  const checkpoints = () => [...document.querySelectorAll("input[name=checkpoint]:checked")].map((box) => Number(box.value));

  function update() {
    const running = job && ["waiting", "running"].includes(job.state);
    $("go").disabled = !source || !checkpoints().length || Boolean(uploading);
    $("cancel").hidden = !running && !uploading;
    $("noise-value").textContent = Number($("noise").value).toFixed(2);
  }

  // The settings of a job, and its file, if that is still there.
  function restore(last, files) {
    for (const name of ["frames", "start", "height", "latents"]) $(name).value = last.settings[name];
    for (const box of document.querySelectorAll("input[name=checkpoint]")) {
      box.checked = last.settings.checkpoints.includes(Number(box.value));
    }
    const file = files.find(({ key }) => key === last.source.key);
    if (file) choose({ ...file, kind: last.source.kind });
    if (file && last.source.kind === "listed") $("listed").value = file.key;
    follow(last);
  }

  // ---- jobs

  async function submit(settings) {
    showError("");
    nextNoise = false;
    asking = true;
    try {
      follow(await ask("POST", "/api/jobs", settings));
    } catch (error) {
      showError(error.message);
      resetNoise();
    } finally {
      asking = false;
    }
  }

  function follow(started) {
    job = started;
    update();
    poll(started.id);
  }

  async function poll(id) {
    if (!job || job.id !== id) return;
    try {
      const now = await ask("GET", `/api/jobs/${id}`);
      if (!job || job.id !== id) return;
      job = now;
    } catch (error) {
      if (job && job.id === id) {
        job = null;
        showState(null);
        showError(error.message);
        resetNoise();
      }
      return;
    }
    if (["waiting", "running"].includes(job.state)) {
      showState(job.text, job.state === "waiting" ? null : job.fraction);
      setTimeout(() => poll(id), POLL);
    } else {
      showState(null);
      if (job.state === "failed") showError(job.text);
      if (job.state === "done") show(job);
      else resetNoise();
    }
    update();
  }

  async function cancel() {
    if (uploading) {
      uploading.onloadend = null;
      uploading.abort();
      uploading = null;
      showState(null);
      update();
      return;
    }
    if (!job) return;
    try {
      await ask("DELETE", `/api/jobs/${job.id}`);
    } catch (error) {
      showError(error.message);
    }
  }

  // ---- the result

  // Opens the page of a result. Where only the noise is another, it takes the place of the page that is there, which
  // stays at its frame and view.
  async function openPage(done) {
    const path = `/results/${done.id}/${done.result.page}`;
    const holder = $("frames-of-result");
    const before = holder.querySelector("iframe");
    const kept = (one) => JSON.stringify([one.source, { ...one.settings, noise: 0, beside: false }]);
    if (before && before.contentWindow.replaceReport && shown && kept(shown) === kept(done)) {
      const response = await fetch(path);
      if (!response.ok) throw new Error("The result is not there any more; run the job again.");
      const next = new DOMParser().parseFromString(await response.text(), "text/html");
      before.contentWindow.replaceReport(next);
      return;
    }
    const frame = element("iframe", "", { title: `Comparison of ${done.name}`, className: "coming", src: path });
    frame.onload = () => {
      frame.contentDocument.head.append(element("style", INSIDE));
      takeDrops(frame.contentWindow);
      if (before) before.remove();
      frame.classList.remove("coming");
    };
    holder.append(frame);
  }

  function show(done) {
    openPage(done).catch((error) => showError(error.message));
    shown = done;
    $("hint").hidden = true;
    $("tools").hidden = false;
    if (!nextNoise) resetNoise();
    const links = Object.entries(done.result.files).map(([label, file]) =>
      element("a", label, { href: `/results/${done.id}/${file}?download=1`, title: "exact, without loss" })
    );
    links.push(element("a", "page", { href: `/results/${done.id}/${done.result.page}?download=1`, title: "this page as one file" }));
    $("links").replaceChildren(...links);
    update();
    if (nextNoise) noise();
  }

  // That of the result that is there, also after a job that gave none.
  function resetNoise() {
    nextNoise = false;
    if (shown) {
      $("noise").value = shown.settings.noise;
      $("beside").checked = shown.settings.beside;
    }
    update();
  }

  // The newest value counts: while a job runs, the slider may move on.
  function noise() {
    update();
    if (!shown) return;
    if (asking || (job && ["waiting", "running"].includes(job.state))) {
      nextNoise = true;
      return;
    }
    const settings = { ...shown.settings, ...shown.source, noise: Number($("noise").value), beside: $("beside").checked };
    const { noise: level, beside } = shown.settings;
    const same = settings.noise === level && (settings.beside === beside || !level);
    if (!same) submit(settings);
  }

  async function remove() {
    if (!shown) return;
    try {
      await ask("DELETE", `/api/jobs/${shown.id}`);
    } catch (error) {
      if (error.status !== 404) showError(error.message);
    }
    if (source && source.kind === "upload") choose(null);
    shown = null;
    $("frames-of-result").replaceChildren();
    $("tools").hidden = true;
    $("hint").hidden = false;
  }

  // As that of the comparison, whose button changes it for both.
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");

  function applyTheme() {
    document.documentElement.dataset.theme = localStorage.getItem("vae3d-theme") || (prefersDark.matches ? "dark" : "light");
  }

  async function start() {
    applyTheme();
    prefersDark.addEventListener("change", applyTheme);
    addEventListener("storage", applyTheme);
    setUpFiles();
    setUpSettings();
    $("form").onsubmit = (event) => {
      event.preventDefault();
      if ($("go").disabled) return;
      submit({
        kind: source.kind,
        key: source.key,
        checkpoints: checkpoints(),
        latents: $("latents").value,
        ...Object.fromEntries(["frames", "start", "height"].map((name) => [name, Number($(name).value)])),
      });
    };
    $("cancel").onclick = cancel;
    $("noise").oninput = update;
    $("noise").onchange = noise;
    $("beside").onchange = noise;
    $("delete").onclick = remove;
    update();
    try {
      const state = await ask("GET", "/api/state");
      list(state.listed);
      const last = state.jobs.at(-1); // after a reload
      if (last && last.state !== "cancelled") restore(last, [...state.listed, ...state.uploads]);
    } catch (error) {
      showError(error.message);
    }
  }

  start();
})();
