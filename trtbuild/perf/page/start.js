"use strict";
// Unpacks plotly.js, which lies in the page as gzip in base64, and draws.

(async () => {
  if (typeof DecompressionStream === "undefined") {
    byId("answer").textContent = "This browser is too old for the plots (it cannot unpack them); points.csv has the figures.";
    drawTable();
    return;
  }
  const packed = Uint8Array.from(atob(byId("plotly").textContent), (character) => character.charCodeAt(0));
  const code = await new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  document.head.append(element("script", code));
  await start();
})();
