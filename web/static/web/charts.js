// Draws the charts of a page with plotly.js in the colours of the theme, and refreshes them while somebody looks.
(() => {
  "use strict";
  const REFRESH_MS = 5000;
  const NARROW_PX = 600;
  const CONFIG = { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };

  const colour = (name) => {
    const probe = document.createElement("i");
    probe.style.color = `var(--${name})`;
    document.body.append(probe);
    const found = getComputedStyle(probe).color;
    probe.remove();
    return found;
  };
  const translucent = (rgb, share) => rgb.replace(/^rgb\((.*)\)$/, `rgba($1, ${share})`);

  const layout = (figure) => {
    const line = colour("line");
    const axis = { gridcolor: line, linecolor: line, zeroline: false, tickcolor: line, automargin: true };
    return {
      ...figure.layout,
      paper_bgcolor: "rgba(0, 0, 0, 0)",
      plot_bgcolor: "rgba(0, 0, 0, 0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("ink-muted") },
      hoverlabel: { bgcolor: colour("surface"), bordercolor: colour("line-strong"), font: { color: colour("ink") } },
      xaxis: { ...axis, ...figure.layout.xaxis },
      yaxis: { ...axis, ...figure.layout.yaxis },
      uirevision: "kept",
    };
  };
  const trace = ({ token, fill_token: fillToken, ...rest }, isNarrow) => {
    const themed = { ...rest };
    if (isNarrow && rest.mode === "markers+text") themed.mode = "markers"; // names would cover one another
    if (token) themed.line = { ...rest.line, color: colour(token) };
    if (token) themed.marker = { ...rest.marker, color: colour(token) };
    if (fillToken) themed.fillcolor = translucent(colour(fillToken), 0.14);
    return themed;
  };

  const start = (element) => {
    let figure = null;
    let etag = null;
    const draw = () => figure && window.Plotly.react(element, figure.data.map((each) => trace(each, element.clientWidth < NARROW_PX)), layout(figure), CONFIG);
    const refresh = async () => {
      const pause = document.getElementById("pause");
      const isPaused = figure && pause?.getAttribute("aria-pressed") === "true";
      if (document.visibilityState !== "visible" || isPaused) return;
      try {
        const headers = etag ? { "If-None-Match": etag } : {};
        const response = await fetch(element.dataset.chart, { headers, cache: "no-store" });
        if (response.status !== 200) return;
        etag = response.headers.get("ETag");
        figure = await response.json();
        element.toggleAttribute("data-empty", figure.data.length === 0);
        if (figure.data.length) draw();
      } catch {
        // The console says that the connection is lost; the chart keeps what it has.
      }
    };
    refresh();
    setInterval(refresh, REFRESH_MS);
    document.addEventListener("themechange", draw);
    window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  };
  for (const element of document.querySelectorAll("[data-chart]")) start(element);
})();
