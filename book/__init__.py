"""What makes the site of docs/: pages run at build time, pictures, tables from the results, the API's pages."""
