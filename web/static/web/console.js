// Keeps the console live: one beat for all fragments, ages that grow, theme, filters. No rules live here.
(() => {
  "use strict";
  const BEAT_MS = 2000;
  const root = document.documentElement;
  const etags = new WeakMap();
  const byId = (id) => document.getElementById(id);

  // -- the beat: fragments refresh on the event "live", only while somebody looks ----------------------------------
  let paused = false;
  let lost = false;

  const say = () => {
    const status = byId("live-status");
    if (!status) return;
    const state = paused ? "paused" : lost ? "lost" : "live";
    const text = { paused: "Paused", lost: "Connection lost, trying again", live: "Live" }[state];
    status.dataset.state = state;
    const words = status.querySelector("span");
    if (words.textContent !== text) words.textContent = text;
  };

  const beat = () => {
    if (!paused && document.visibilityState === "visible") window.htmx.trigger(document.body, "live");
  };
  setInterval(beat, BEAT_MS);
  document.addEventListener("visibilitychange", beat);

  // -- fragments: send the ETag that is shown, and disturb nobody who is reading or selecting ---------------------
  const isSelecting = (element) => {
    const selection = window.getSelection();
    return Boolean(selection && !selection.isCollapsed && element.contains(selection.anchorNode));
  };
  const kept = (element) => ({
    open: [...element.querySelectorAll("details[id]")].map((each) => [each.id, each.open]),
    scrolled: [...element.querySelectorAll(".scroll[id]")].map((each) => [each.id, each.scrollLeft, each.scrollTop]),
  });
  const restore = ({ open, scrolled }) => {
    for (const [id, wasOpen] of open) byId(id)?.toggleAttribute("open", wasOpen);
    for (const [id, left, top] of scrolled) byId(id)?.scrollTo(left, top);
  };

  document.addEventListener("htmx:configRequest", ({ detail }) => {
    const etag = etags.get(detail.elt);
    if (etag && detail.elt.hasAttribute("data-live")) detail.headers["If-None-Match"] = etag;
  });
  document.addEventListener("htmx:beforeSwap", ({ detail }) => {
    if (!detail.elt.hasAttribute("data-live") || detail.xhr.status !== 200) return;
    if (isSelecting(detail.target)) detail.shouldSwap = false;
    else {
      etags.set(detail.elt, detail.xhr.getResponseHeader("ETag"));
      detail.target.keptState = kept(detail.target);
    }
  });
  document.addEventListener("htmx:afterSwap", ({ detail }) => {
    if (detail.target.keptState) restore(detail.target.keptState);
    grow();
  });
  document.addEventListener("htmx:afterRequest", ({ detail }) => {
    lost = detail.xhr.status === 0 || detail.xhr.status >= 500;
    say();
  });

  // -- ages: grow every second by the server's clock ----------------------------------------------------------------
  const offset = Number(root.dataset.now || Date.now()) - Date.now();
  const distance = (s) => {
    if (s < 120) return `${Math.floor(s)} s`;
    if (s < 7200) return `${Math.floor(s / 60)} min`;
    if (s < 172800) return `${Math.floor(s / 3600)} h`;
    return `${Math.floor(s / 86400)} days`;
  };
  const age = (moment) => {
    const s = (Date.now() + offset - moment) / 1000;
    if (Math.abs(s) < 1) return "just now";
    return s > 0 ? `${distance(s)} ago` : `in ${distance(-s)}`;
  };
  const grow = () => {
    for (const each of document.querySelectorAll("time[data-ago]")) {
      const text = age(Date.parse(each.dateTime));
      if (each.textContent !== text) each.textContent = text;
    }
  };
  setInterval(grow, 1000);

  // -- buttons ------------------------------------------------------------------------------------------------------
  const THEMES = ["system", "light", "dark"];
  const showTheme = (button) => {
    const theme = root.dataset.theme || "system";
    button.querySelector("span").textContent = { system: "Auto", light: "Light", dark: "Dark" }[theme];
  };
  const nextTheme = (button) => {
    const theme = THEMES[(THEMES.indexOf(root.dataset.theme || "system") + 1) % THEMES.length];
    if (theme === "system") delete root.dataset.theme;
    else root.dataset.theme = theme;
    try {
      localStorage.setItem("theme", theme);
    } catch {
      // Holds for this page then.
    }
    showTheme(button);
    document.dispatchEvent(new Event("themechange"));
  };
  const themeButton = byId("theme");
  if (themeButton) {
    showTheme(themeButton);
    themeButton.hidden = false;
    themeButton.addEventListener("click", () => nextTheme(themeButton));
  }
  const pauseButton = byId("pause");
  if (pauseButton) {
    pauseButton.hidden = false;
    pauseButton.addEventListener("click", () => {
      paused = !paused;
      pauseButton.setAttribute("aria-pressed", String(paused));
      say();
      beat();
    });
  }
  document.addEventListener("change", ({ target }) => {
    if (target.form?.hasAttribute("data-submit-on-change")) target.form.requestSubmit();
  });
})();
