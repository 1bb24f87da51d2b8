// The reviewer's form: the draft that the page carries, filled in, saved as a file.
(() => {
  "use strict";
  const form = document.getElementById("review-form");
  const draft = JSON.parse(document.getElementById("review-draft").textContent);
  form.hidden = false;

  const filled = () => {
    const given = new FormData(form);
    return {
      ...draft,
      decision: given.get("decision"),
      tracks: draft.tracks.map((track, place) => ({
        ...track,
        label: given.get(`label-${place}`),
        wrong_face: given.has(`wrong-${place}`),
        poor_quality: given.has(`poor-${place}`),
      })),
      note: given.get("note"),
      reviewed_at: new Date().toISOString(),
    };
  };

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const text = JSON.stringify(filled(), null, 2) + "\n";
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    link.download = `ralf-review-${draft.media_sha256.slice(0, 12)}.json`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    document.getElementById("review-saved").textContent = `Saved as ${link.download}`;
  });
})();
