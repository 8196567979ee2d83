/* Search in pages that are opened as files.
 *
 * A browser starts no Worker for such a page. The theme's search then runs in a hidden frame of the page,
 * which looks like a Worker from both sides. Pages from a server keep the browser's own. */
if (location.protocol === "file:") {
  window.Worker = window.IFrameWorker = class extends EventTarget {
    constructor(url) {
      super();
      const script = document.createElement("script");
      script.src = url;
      const frame = document.createElement("iframe");
      frame.hidden = true;
      frame.srcdoc = script.outerHTML;
      this.inside = new Promise((ready) => {
        frame.onload = () => {
          // What the script posts is for the page, and would else come back to the frame.
          frame.contentWindow.postMessage = (data) =>
            this.dispatchEvent(new MessageEvent("message", { data }));
          ready(frame.contentWindow);
        };
      });
      document.body.append(frame);
    }

    postMessage(data) {
      this.inside.then((frame) => frame.dispatchEvent(new MessageEvent("message", { data })));
    }
  };
}
